/** The overview: where ranks stand, and what each stage and layer took. */

import { Board, FONT, fit } from "./board.js";
import { RankMap } from "./rankmap.js";
import { Shares } from "./shares.js";
import { amountColour, inkOn, stripes } from "./palette.js";
import { writeBytes, writeCount, writeRanks, writeTime } from "./text.js";

const PHASES = ["forward", "prefill", "decode", "backward", "optimizer", ""];

export class Overview {
  /**
   * @param {HTMLElement} place
   * @param {import("./app.js").App} app
   */
  constructor(place, app) {
    this.app = app;
    app.tools(place, [app.metricChoice(), app.axisChoice()]);
    const panels = document.createElement("div");
    panels.className = "panels";
    place.append(panels);
    const column = Object.assign(document.createElement("div"), { className: "column" });
    panels.append(column);
    this.map = new RankMap(app.panel(column, "Ranks and their process groups", "map"), app);
    this.shares = new Shares(app.panel(column, "How each rank spent the time", "shares"), app);
    const matrix = app.panel(panels, "Stages and layers", "matrix");
    this.board = new Board(matrix.body, "Stages and layers", {
      draw: () => this.draw(),
      hover: (x, y) => { const cell = this.at(x, y); return cell < 0 ? null : this.tell(cell); },
      click: (x, y) => { const cell = this.at(x, y); app.select(cell < 0 ? null : { kind: "cell", id: cell }); },
      double: (x, y) => { const cell = this.at(x, y); if (cell >= 0) app.goTo({ kind: "cell", id: cell }, "graph"); },
    });
    this.scale = matrix.note;
    /** @type {{ stage: number, phase: string }[]} */
    this.rows = [];
    /** @type {number[]} */
    this.layers = [];
    this.grid = new Int32Array(0);
    this.frame = { left: 0, top: 0, width: 1, height: 1 };
    this.arrange();
  }

  /** Rows are stages and phases, columns layers. */
  arrange() {
    const { cells } = this.app.model;
    const rows = new Map();
    const layers = new Set();
    for (let cell = 0; cell < (cells?.length ?? 0); cell++) {
      const phase = this.app.model.word(cells.phase, cell);
      rows.set(`${cells.stage[cell]} ${phase}`, { stage: cells.stage[cell], phase });
      layers.add(cells.layer[cell]);
    }
    this.rows = [...rows.values()].sort((one, other) =>
      (one.stage < 0 ? 1e9 : one.stage) - (other.stage < 0 ? 1e9 : other.stage) || PHASES.indexOf(one.phase) - PHASES.indexOf(other.phase));
    this.layers = [...layers].sort((one, other) => one - other);
    const rowOf = new Map(this.rows.map((row, at) => [`${row.stage} ${row.phase}`, at]));
    const columnOf = new Map(this.layers.map((layer, at) => [layer, at]));
    this.grid = new Int32Array(this.rows.length * this.layers.length).fill(-1);
    for (let cell = 0; cell < (cells?.length ?? 0); cell++) {
      const row = rowOf.get(`${cells.stage[cell]} ${this.app.model.word(cells.phase, cell)}`) ?? 0;
      this.grid[row * this.layers.length + (columnOf.get(cells.layer[cell]) ?? 0)] = cell;
    }
  }

  /** @param {number} cell */
  amount(cell) {
    const { cells } = this.app.model;
    const { metric } = this.app.state;
    const isMeasured = cells.mean_ns[cell] >= 0;
    if (metric === "bytes") return { value: cells.sent_bytes[cell], isEstimated: false };
    if (metric === "nodes") return { value: cells.num_nodes[cell], isEstimated: false };
    if (metric === "waiting") return { value: cells.wait_ns[cell], isEstimated: false };
    if (metric === "imbalance") {
      return { value: cells.mean_ns[cell] > 0 ? cells.max_ns[cell] / cells.mean_ns[cell] - 1 : NaN, isEstimated: false };
    }
    return { value: isMeasured ? cells.mean_ns[cell] : cells.estimated_ns[cell], isEstimated: !isMeasured };
  }

  draw() {
    const { board, app } = this;
    const { context } = board;
    const { colours } = app;
    const left = 132;
    const top = 30;
    const columns = this.layers.length;
    this.frame = {
      left, top,
      width: Math.min(72, (board.width - left - 8) / Math.max(columns, 1)),
      height: Math.min(52, (board.height - top - 8) / Math.max(this.rows.length, 1)),
    };
    const { width, height } = this.frame;
    let most = 0;
    let mark = "";
    for (const cell of this.grid) {
      if (cell < 0) continue;
      const { value, isEstimated } = this.amount(cell);
      most = Math.max(most, value || 0);
      if (isEstimated && value >= 0) mark = "≈ ";
    }
    const text = mark + this.wordOf(most);
    this.scale.textContent = most ? `${this.describe()} · dark 0, bright ${text} (root scale) · –: no layer` : `${this.describe()}: nothing known`;
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    context.fillStyle = colours.quiet;
    context.textAlign = "center";
    const every = Math.ceil(22 / width);
    this.layers.forEach((layer, column) => {
      if (layer < 0 || column % every === 0) {
        context.fillText(layer < 0 ? (width > 34 ? "no layer" : "–") : String(layer), left + (column + 0.5) * width, top - 10);
      }
    });
    context.textAlign = "left";
    const marked = this.markedCells();
    this.rows.forEach((row, at) => {
      const y = top + at * height;
      const hasStages = this.rows.some((one) => one.stage >= 0);
      const told = `${row.stage >= 0 ? `stage ${row.stage}` : hasStages ? "across" : ""} ${row.phase || "no phase"}`.trim();
      context.fillStyle = colours.quiet;
      if (height >= 9) context.fillText(fit(context, told, left - 12), 4, y + height / 2);
      for (let column = 0; column < columns; column++) {
        const cell = this.grid[at * columns + column];
        if (cell < 0) continue;
        const { value, isEstimated } = this.amount(cell);
        const x = left + column * width;
        const passes = app.passesCell(cell);
        context.globalAlpha = passes ? 1 : 0.15;
        if (value >= 0) {
          const share = most ? Math.sqrt(value / most) : 0;
          context.fillStyle = isEstimated ? stripes(context, amountColour(share), colours.panel) : amountColour(share);
          context.fillRect(x + 0.5, y + 0.5, width - 1, height - 1);
          if (width >= 44 && height >= 16 && passes) {
            context.fillStyle = isEstimated ? colours.ink : inkOn(share);
            context.font = `10px ${FONT}`;
            context.fillText(fit(context, this.wordOf(value), width - 6), x + 4, y + height / 2);
            context.font = `11px ${FONT}`;
          }
        } else {
          context.strokeStyle = colours.quiet;
          context.setLineDash([2, 2]);
          context.strokeRect(x + 1.5, y + 1.5, width - 3, height - 3);
          context.setLineDash([]);
        }
        context.globalAlpha = 1;
        if (marked.has(cell)) {
          context.strokeStyle = colours.accent;
          context.lineWidth = 2;
          context.strokeRect(x + 1, y + 1, width - 2, height - 2);
          context.lineWidth = 1;
        }
      }
    });
    this.map.board.draw();
    this.shares.board.draw();
  }

  /** @param {number} value */
  wordOf(value) {
    const { metric } = this.app.state;
    if (metric === "bytes") return writeBytes(value);
    if (metric === "nodes") return writeCount(value);
    return metric === "imbalance" ? `+${Math.round(100 * value)} %` : writeTime(value);
  }

  describe() {
    return {
      time: "time on a rank, mean", waiting: "waiting for others on a rank, mean", bytes: "bytes given to communications",
      imbalance: "slowest rank above the mean", nodes: "nodes of the graph",
    }[this.app.state.metric] ?? "";
  }

  markedCells() {
    const { marks, model, state } = this.app;
    const found = new Set();
    if (state.selection?.kind === "cell") return found.add(state.selection.id);
    if (!marks.leaves.length) return found;
    const wanted = new Set();
    for (const [low, high] of marks.leaves) {
      for (let leaf = low; leaf < high; leaf++) {
        wanted.add(`${model.leaves.stage[leaf]} ${model.leaves.layer[leaf]} ${model.word(model.leaves.phase, leaf)}`);
      }
    }
    for (let cell = 0; cell < model.cells.length; cell++) {
      if (wanted.has(`${model.cells.stage[cell]} ${model.cells.layer[cell]} ${model.word(model.cells.phase, cell)}`)) found.add(cell);
    }
    return found;
  }

  /** @param {number} x @param {number} y */
  at(x, y) {
    if (!this.frame) return -1;
    const column = Math.floor((x - this.frame.left) / this.frame.width);
    const row = Math.floor((y - this.frame.top) / this.frame.height);
    if (column < 0 || row < 0 || column >= this.layers.length || row >= this.rows.length) return -1;
    return this.grid[row * this.layers.length + column];
  }

  /** @param {number} cell */
  tell(cell) {
    const { cells } = this.app.model;
    const stage = cells.stage[cell] < 0 ? "across stages" : `stage ${cells.stage[cell]}`;
    const layer = cells.layer[cell] < 0 ? "no layer" : `layer ${cells.layer[cell]}`;
    const { value, isEstimated } = this.amount(cell);
    const time = cells.mean_ns[cell] >= 0
      ? `mean ${writeTime(cells.mean_ns[cell])}, max ${writeTime(cells.max_ns[cell])} on rank ${cells.worst_rank[cell]}`
      : isEstimated && value >= 0 ? `≈ ${writeTime(value)} (estimated)` : "time unknown";
    return `${stage}, ${layer}, ${this.app.model.word(cells.phase, cell) || "no phase told"}\n${time}\n` +
      `waiting ${writeTime(cells.wait_ns[cell])} · ${writeBytes(cells.sent_bytes[cell])} sent\n` +
      `${writeCount(cells.num_nodes[cell])} nodes on ${writeRanks(cells.num_ranks[cell])}`;
  }

  /** @param {KeyboardEvent} event */
  key_(event) {
    return this.map.key_(event);
  }
}
