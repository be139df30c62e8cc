/** How each rank spent the time, as bars; of very many ranks, each stage's mean. */

import { Board, FONT } from "./board.js";
import { stripes } from "./palette.js";
import { writeTime } from "./text.js";

const KINDS = /** @type {const} */ (["compute", "transfer", "waiting", "bubble", "host"]);
const MOST = 64;
const LEFT = 62;

export class Shares {
  /**
   * @param {{ body: HTMLElement, note: HTMLElement }} panel
   * @param {import("./app.js").App} app
   */
  constructor(panel, app) {
    this.app = app;
    this.note = panel.note;
    const { ranks } = app.model;
    /** @type {{ name: string, rank: number, spent: number[] }[]} */
    this.rows = [];
    if (ranks.length <= MOST) {
      for (let row = 0; row < ranks.length; row++) {
        this.rows.push({ name: `rank ${ranks.rank[row]}`, rank: ranks.rank[row], spent: KINDS.map((kind) => ranks[`${kind}_ns`][row]) });
      }
    } else {
      const stages = [...new Set(Array.from(/** @type {Iterable<number>} */ (ranks.pp)))].sort((one, other) => one - other);
      for (const stage of stages) {
        const own = Array.from({ length: ranks.length }, (_, row) => row).filter((row) => ranks.pp[row] === stage);
        const spent = KINDS.map((kind) => own.reduce((sum, row) => sum + ranks[`${kind}_ns`][row], 0) / own.length);
        this.rows.push({ name: stage < 0 ? "no stage" : `stage ${stage}`, rank: -1, spent });
      }
    }
    this.note.textContent = app.model.hasTimes && ranks.length > MOST ? "the mean over each stage's ranks" : "";
    this.board = new Board(panel.body, "How each rank spent the time", {
      draw: () => this.draw(),
      hover: (x, y) => { const row = this.at(y); return row ? this.tell(row) : null; },
      click: (x, y) => { const row = this.at(y); if (row && row.rank >= 0) app.select({ kind: "rank", id: row.rank }); },
    });
  }

  draw() {
    const { board, app } = this;
    const { context } = board;
    const { colours, marks, model } = app;
    const height = Math.min(24, (board.height - 4) / Math.max(1, this.rows.length));
    this.height = height;
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    if (!model.hasTimes) {
      app.sayOn(board, app.model.meta.dry ? "No time is known: truedag dry --device NAME estimates it." : "No time is known.");
      return;
    }
    const every = Math.max(1, Math.ceil(12 / height));
    this.rows.forEach((row, at) => {
      const y = 2 + at * height;
      const whole = row.spent.reduce((sum, value) => sum + value, 0);
      context.fillStyle = marks.ranks.has(row.rank) ? colours.ink : colours.quiet;
      if (at % every === 0) context.fillText(row.name, 0, y + height / 2);
      const room = board.width - LEFT;
      if (!(whole > 0)) {
        context.strokeStyle = colours.quiet;
        context.setLineDash([3, 3]);
        context.strokeRect(LEFT + 0.5, y + 2, room - 1, Math.max(1, height - 4));
        context.setLineDash([]);
        return;
      }
      let x = LEFT;
      row.spent.forEach((value, kind) => {
        const colour = colours.kinds[KINDS[kind]];
        const width = (value / whole) * room;
        context.fillStyle = model.meta.is_estimated ? stripes(context, colour, colours.panel) : colour;
        context.fillRect(x, y + (height > 8 ? 2 : 0), width, height - (height > 8 ? 4 : 0.5));
        if (width > 40 && height > 14 && !model.meta.is_estimated) {
          context.fillStyle = (app.isDark && KINDS[kind] !== "bubble") || KINDS[kind] === "transfer" || (!app.isDark && KINDS[kind] === "bubble") || KINDS[kind] === "host" ? "#111111" : "#ffffff";
          context.fillText(`${Math.round((100 * value) / whole)} %`, x + 5, y + height / 2);
        }
        x += width;
      });
      if (marks.ranks.has(row.rank)) {
        context.strokeStyle = colours.accent;
        context.lineWidth = 2;
        context.strokeRect(LEFT - 1, y + 1, room, height - 2);
        context.lineWidth = 1;
      }
    });
  }

  /** @param {number} y */
  at(y) {
    return this.rows[Math.floor((y - 2) / (this.height || 1))];
  }

  /** @param {{ name: string, spent: number[] }} row */
  tell(row) {
    const mark = this.app.model.meta.is_estimated ? "≈ " : "";
    return `${row.name}\n${KINDS.map((kind, at) => `${kind} ${mark}${writeTime(row.spent[at])}`).join("\n")}`;
  }
}
