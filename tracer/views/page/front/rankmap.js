/** Ranks as cells, stage by stage; the groups of the one that is selected are outlined. */

import { Board, FONT } from "./board.js";
import { tellScale } from "./controls.js";
import { TURNS, amountColour, inkOn, stripes } from "./palette.js";
import { writeBytes, writeCount, writeExcess, writeRanks, writeRuns, writeTime } from "./text.js";
import { countRuns, eachRun } from "./model.js";

const AXES = ["tp", "ep", "etp", "pp", "dp", "edp", "cp"];
const TURN_NAMES = ["blue", "orange", "green", "pink", "sky blue", "vermilion", "yellow"];
const NAMED = 36; // pixels of a cell that has room for names of axes

export class RankMap {
  /**
   * @param {{ body: HTMLElement, note: HTMLElement }} panel
   * @param {import("./app.js").App} app
   */
  constructor(panel, app) {
    this.app = app;
    this.note = panel.note;
    this.x = new Float64Array(0);
    this.y = new Float64Array(0);
    this.meanCompute = NaN;
    this.grid = { size: 0, across: 1, columns: 1 };
    this.board = new Board(panel.body, "Ranks and their process groups", {
      draw: () => this.draw(),
      hover: (x, y) => { const row = this.at(x, y); return row < 0 ? null : this.tell(row); },
      click: (x, y) => {
        const row = this.at(x, y);
        app.select(row < 0 ? null : { kind: "rank", id: app.model.ranks.rank[row] });
      },
      double: (x, y) => { const row = this.at(x, y); if (row >= 0) app.goTo({ kind: "rank", id: app.model.ranks.rank[row] }, "time"); },
    });
    const { ranks } = app.model;
    const stages = new Map();
    for (let row = 0; row < ranks.length; row++) {
      const stage = ranks.pp[row];
      if (!stages.has(stage)) stages.set(stage, []);
      stages.get(stage).push(row);
    }
    /** @type {{ stage: number, rows: number[] }[]} */
    this.blocks = [...stages].sort((one, other) => one[0] - other[0]).map(([stage, rows]) => ({ stage, rows }));
  }

  /** Choose how many cells stand side by side: whole TP groups, and blocks that fill the place. */
  arrange() {
    const { width, height } = this.board;
    const most = Math.max(1, ...this.blocks.map((block) => block.rows.length));
    const tp = Math.max(1, 1 + Math.max(...this.app.model.ranks.tp));
    let best = { size: 0, across: 1, columns: 1 };
    for (let columns = 1; columns <= this.blocks.length; columns++) {
      const down = Math.ceil(this.blocks.length / columns);
      for (let across = tp; across <= Math.max(tp, most); across += tp) {
        if (most > 64 && most % across) continue; // whole rows, so that equal places stand below each other
        const wide = (width - 16 - (columns - 1) * 14) / (columns * Math.min(across, most));
        const high = (height - 12 - down * 30) / (down * Math.ceil(most / across));
        const size = Math.min(wide, high, 78);
        if (size > best.size) best = { size, across, columns };
      }
    }
    this.grid = best;
    const blockWidth = Math.min(best.across, most) * best.size;
    const blockHeight = Math.ceil(most / best.across) * best.size;
    this.x = new Float64Array(this.app.model.ranks.length);
    this.y = new Float64Array(this.app.model.ranks.length);
    this.heads = this.blocks.map((block, number) => {
      const x = 8 + (number % best.columns) * (blockWidth + 14);
      const y = 26 + Math.floor(number / best.columns) * (blockHeight + 30);
      block.rows.forEach((row, place) => {
        this.x[row] = x + (place % best.across) * best.size;
        this.y[row] = y + Math.floor(place / best.across) * best.size;
      });
      return { stage: block.stage, x, y, count: block.rows.length };
    });
  }

  /** @param {number} row */
  amount(row) {
    const { ranks } = this.app.model;
    const { metric } = this.app.state;
    if (metric === "bytes") return ranks.sent_bytes[row];
    if (metric === "nodes") return ranks.num_parts[row];
    if (metric === "path") return this.app.model.pieces ? this.app.model.pathOfRank[row] : NaN;
    if (metric === "waiting") return ranks.waiting_ns[row] + ranks.bubble_ns[row];
    if (metric === "imbalance") return this.meanCompute > 0 ? Math.max(0, ranks.compute_ns[row] / this.meanCompute - 1) : NaN;
    return ranks.compute_ns[row];
  }

  draw() {
    const { app, board } = this;
    const { context } = board;
    const { colours, model, state } = app;
    const { ranks } = model;
    this.arrange();
    const known = [...ranks.compute_ns].filter((value) => value >= 0);
    this.meanCompute = known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : NaN;
    const values = Array.from({ length: ranks.length }, (_, row) => this.amount(row));
    const most = Math.max(0, ...values.filter((value) => value >= 0));
    const size = this.grid?.size ?? 1;
    const axis = state.place && ranks[state.place] ? state.place : "";
    const isEstimated = model.meta.is_estimated && !["bytes", "nodes"].includes(state.metric);
    context.textBaseline = "middle";
    for (const head of this.heads ?? []) {
      context.font = `600 12px ${FONT}`;
      context.fillStyle = colours.quiet;
      context.textAlign = "left";
      context.fillText(`${head.stage < 0 ? "no stage told" : `stage ${head.stage}`} · ${writeRanks(head.count)}`, head.x, head.y - 11);
    }
    context.textAlign = "center";
    const gap = size > 12 ? 1 : size > 5 ? 0.5 : 0.15;
    for (let row = 0; row < ranks.length; row++) {
      const [x, y] = [this.x[row], this.y[row]];
      const passes = !app.filter.ranks || app.filter.ranks.has(ranks.rank[row]);
      context.globalAlpha = passes ? 1 : 0.15;
      let ink = colours.ink;
      if (axis) {
        const at = ranks[axis][row];
        context.fillStyle = at < 0 ? colours.line : TURNS[at % TURNS.length];
        ink = "#111111";
      } else if (values[row] >= 0) {
        const share = most ? values[row] / most : 0;
        context.fillStyle = isEstimated ? stripes(context, amountColour(share), colours.panel) : amountColour(share);
        ink = isEstimated ? colours.ink : inkOn(share);
      } else context.fillStyle = colours.box;
      context.fillRect(x + gap, y + gap, size - 2 * gap, size - 2 * gap);
      if (!axis && !(values[row] >= 0) && size > 5) {
        context.strokeStyle = colours.quiet;
        context.setLineDash([2, 2]);
        context.strokeRect(x + gap + 0.5, y + gap + 0.5, size - 2 * gap - 1, size - 2 * gap - 1);
        context.setLineDash([]);
      }
      if (size >= 17) {
        context.fillStyle = ink;
        context.font = `${size >= 40 ? 13 : Math.max(8, Math.min(11, size / 2.6))}px ${FONT}`;
        context.fillText(axis && size >= 30 ? `${ranks.rank[row]} · ${ranks[axis][row]}` : String(ranks.rank[row]), x + size / 2, y + size / 2);
      }
    }
    context.globalAlpha = 1;
    this.drawMarks(size);
    const told = /** @type {{ [metric: string]: string }} */ ({ time: "compute", waiting: "waiting for others", bytes: "bytes given", imbalance: "compute above the mean", nodes: "nodes with a part here", path: "time on the critical path" })[state.metric];
    const text = state.metric === "nodes" ? writeCount(most) : state.metric === "bytes" ? writeBytes(most) : state.metric === "imbalance" ? writeExcess(most) : writeTime(most);
    const legend = state.selection?.kind === "rank" && size < NAMED
      ? ` · shares ${[...new Set([...this.sharing(state.selection.id).values()].map((axes) => axes[0]))].map((name) => `${name} (${TURN_NAMES[AXES.indexOf(name)]})`).join(", ")}` : "";
    if (axis) tellScale(this.note, `place on ${axis}`, null, { after: legend });
    else if (most) tellScale(this.note, told, ["0", `${isEstimated ? "≈ " : ""}${text}`], { isEstimated, after: legend });
    else tellScale(this.note, `${told}: unknown`, null, { after: legend });
  }

  /**
   * Who shares a group with the selected rank: by name where there is room, else by the colour that the note tells.
   * @param {number} size
   */
  drawMarks(size) {
    const { app, board } = this;
    const { context } = board;
    const { marks, model, colours, state } = app;
    const width = Math.max(1.4, Math.min(3, size / 9));
    if (state.selection?.kind === "rank") {
      const shared = this.sharing(state.selection.id);
      context.lineWidth = width;
      for (const [rank, axes] of shared) {
        const row = model.rowOfRank.get(rank);
        if (row === undefined) continue;
        context.strokeStyle = size >= NAMED ? colours.accent : TURNS[AXES.indexOf(axes[0]) % TURNS.length];
        context.setLineDash(size >= NAMED ? [4, 3] : []);
        context.strokeRect(this.x[row] + width, this.y[row] + width, size - 2 * width, size - 2 * width);
        if (size >= NAMED) this.name(axes.join(" "), this.x[row] + size / 2, this.y[row] + size - 11);
      }
      context.setLineDash([]);
    }
    context.strokeStyle = colours.accent;
    context.lineWidth = width + 0.6;
    for (const rank of marks.ranks) {
      const row = model.rowOfRank.get(rank);
      if (row !== undefined) context.strokeRect(this.x[row] + 0.5, this.y[row] + 0.5, size - 1, size - 1);
    }
    context.lineWidth = 1;
  }

  /** Other ranks in the groups of one, and by which axes. @param {number} own */
  sharing(own) {
    const { app } = this;
    /** @type {Map<number, string[]>} */
    const shared = new Map();
    for (const axis of AXES) {
      // The smallest group of an axis: larger ones span others as well.
      const size = (/** @type {{ id: number }} */ group) => countRuns(app.model.runs(app.model.groups.ranks, group.id));
      const groups = app.groupsOf(own).filter((one) => one.axis === axis).sort((one, other) => size(one) - size(other));
      for (const group of groups.slice(0, 1)) {
        eachRun(app.model.runs(app.model.groups.ranks, group.id), (rank) => {
          if (rank === own) return;
          const known = shared.get(rank) ?? [];
          if (!known.includes(axis)) shared.set(rank, [...known, axis]);
        });
      }
    }
    return shared;
  }

  /** @param {string} text @param {number} x @param {number} y */
  name(text, x, y) {
    const { context } = this.board;
    const { colours } = this.app;
    context.font = `600 10px ${FONT}`;
    context.textAlign = "center";
    const width = context.measureText(text).width + 6;
    context.fillStyle = colours.panel;
    context.fillRect(x - width / 2, y - 7, width, 14);
    context.fillStyle = colours.ink;
    context.fillText(text, x, y);
  }

  /** @param {number} x @param {number} y */
  at(x, y) {
    const size = this.grid?.size ?? 0;
    for (let row = 0; row < this.app.model.ranks.length; row++) {
      if (x >= this.x[row] && x < this.x[row] + size && y >= this.y[row] && y < this.y[row] + size) return row;
    }
    return -1;
  }

  /** @param {number} row */
  tell(row) {
    const { ranks, meta } = this.app.model;
    const rank = ranks.rank[row];
    const told = ["compute", "transfer", "waiting", "bubble", "host"].map((name) => {
      const spent = ranks[`${name}_ns`][row];
      return `${name} ${meta.is_estimated && spent >= 0 ? "≈ " : ""}${writeTime(spent)}`;
    }).join(" · ");
    const groups = this.app.groupsOf(rank)
      .map((group) => `${group.axis} ${writeRuns(this.app.model.runs(this.app.model.groups.ranks, group.id), 4)}`).join("\n");
    return `rank ${rank}\n${told}\n${writeBytes(ranks.sent_bytes[row])} given to communications\n${groups}`;
  }

  /** @param {KeyboardEvent} event */
  key_(event) {
    const { app } = this;
    const { ranks } = app.model;
    const row = app.state.selection?.kind === "rank" ? app.model.rowOfRank.get(app.state.selection.id) ?? -1 : -1;
    const across = this.grid?.across ?? 1;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
    if (step === undefined) {
      if (event.key !== "Enter" || row < 0) return false;
      app.goTo({ kind: "rank", id: ranks.rank[row] }, "time");
      return true;
    }
    const next = row < 0 ? 0 : Math.min(Math.max(row + step, 0), ranks.length - 1);
    app.select({ kind: "rank", id: ranks.rank[next] });
    return true;
  }
}
