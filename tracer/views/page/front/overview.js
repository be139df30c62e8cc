/** The overview: where ranks stand, and what each stage and layer took. */

import { Board, FONT, fit } from "./board.js";
import { tellScale } from "./controls.js";
import { RankMap } from "./rankmap.js";
import { Shares } from "./shares.js";
import { amountColour, inkOn, stripes } from "./palette.js";
import { writeBytes, writeCount, writeEither, writeExcess, writeFlops, writeRanks, writeTime } from "./text.js";

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
    const hasLayers = app.model.cells?.layer.some((/** @type {number} */ layer) => layer >= 0);
    const title = hasLayers ? "Stages and layers" : "Stages and parts of the model";
    const matrix = app.panel(panels, title, "matrix");
    this.board = new Board(matrix.body, title, {
      draw: () => this.draw(),
      hover: (x, y) => { const cell = this.at(x, y); return cell < 0 ? null : this.tell(cell); },
      click: (x, y) => { const cell = this.at(x, y); app.select(cell < 0 ? null : { kind: "cell", id: cell }); },
      double: (x, y) => { const cell = this.at(x, y); if (cell >= 0) app.goTo({ kind: "cell", id: cell }, "graph"); },
    });
    this.scale = matrix.note;
    /** @type {{ key: string, stage: number, phase: string }[]} */
    this.rows = [];
    /** @type {{ key: string, layer: number, part: string }[]} */
    this.columns = [];
    this.grid = new Int32Array(0);
    this.frame = { left: 0, top: 0, width: 1, height: 1 };
    this.arrange();
  }

  /** Rows are stages and phases, columns layers, or parts of the model where no layer was told. */
  arrange() {
    const { model } = this.app;
    const { cells } = model;
    const numbers = Array.from({ length: cells?.length ?? 0 }, (_, cell) => cell);
    const rowKey = (/** @type {number} */ cell) => `${cells.stage[cell]} ${model.word(cells.phase, cell)}`;
    const columnKey = (/** @type {number} */ cell) => `${cells.layer[cell]} ${model.word(cells.part, cell)}`;
    this.rows = [...new Map(numbers.map((cell) => [rowKey(cell), { key: rowKey(cell), stage: cells.stage[cell], phase: model.word(cells.phase, cell) }])).values()];
    // What no phase was told of runs first where no forward pass was told, and is the rest where one was.
    const phases = this.rows.some(({ phase }) => phase === "forward" || phase === "prefill") ? PHASES : ["", ...PHASES];
    this.rows.sort((one, other) =>
      (one.stage < 0 ? 1e9 : one.stage) - (other.stage < 0 ? 1e9 : other.stage) || phases.indexOf(one.phase) - phases.indexOf(other.phase));
    this.columns = [...new Map(numbers.map((cell) => [columnKey(cell), { key: columnKey(cell), layer: cells.layer[cell], part: model.word(cells.part, cell) }])).values()];
    // Parts stand as the model runs them: by the first of the leaves that are of them.
    const first = new Map();
    for (let leaf = 0; leaf < model.numLeaves; leaf++) {
      const part = model.word(model.leaves.part, leaf);
      if (part && !model.isEnd[leaf] && !first.has(part)) first.set(part, leaf);
    }
    this.columns.sort((one, other) => one.layer - other.layer || (first.get(one.part) ?? -1) - (first.get(other.part) ?? -1));
    const rowOf = new Map(this.rows.map((row, at) => [row.key, at]));
    const columnOf = new Map(this.columns.map((column, at) => [column.key, at]));
    this.grid = new Int32Array(this.rows.length * this.columns.length).fill(-1);
    for (const cell of numbers) this.grid[Number(rowOf.get(rowKey(cell))) * this.columns.length + Number(columnOf.get(columnKey(cell)))] = cell;
  }

  /** @param {number} cell */
  amount(cell) {
    const { cells } = this.app.model;
    const { metric } = this.app.state;
    const isMeasured = cells.mean_ns[cell] >= 0;
    if (metric === "bytes") return { value: cells.sent_bytes[cell], isEstimated: false };
    if (metric === "nodes") return { value: cells.num_nodes[cell], isEstimated: false };
    if (metric === "path") return { value: this.app.model.pieces ? this.app.model.pathOfCell[cell] : NaN, isEstimated: this.app.model.meta.is_estimated };
    if (metric === "waiting") {
      const isSure = cells.wait_ns[cell] >= 0;
      const value = isSure ? cells.wait_ns[cell] : cells.estimated_wait_ns[cell];
      return { value, isEstimated: !isSure && value >= 0 };
    }
    if (metric === "imbalance") {
      const [mean, most] = isMeasured ? [cells.mean_ns[cell], cells.max_ns[cell]] : [cells.estimated_ns[cell], cells.estimated_max_ns[cell]];
      return { value: mean > 0 ? most / mean - 1 : NaN, isEstimated: !isMeasured };
    }
    return { value: isMeasured ? cells.mean_ns[cell] : cells.estimated_ns[cell], isEstimated: !isMeasured };
  }

  draw() {
    const { board, app } = this;
    const { context } = board;
    const { colours } = app;
    const hasStages = this.rows.some((one) => one.stage >= 0);
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    const names = this.rows.map((row) => `${row.stage >= 0 ? `stage ${row.stage}` : hasStages ? "across stages" : ""} ${row.phase || "no phase"}`.trim());
    const titles = this.columns.map(({ layer, part }) => (layer >= 0 ? String(layer) : part ? part.slice(part.lastIndexOf(" / ") + 1).replace("/ ", "") : "–"));
    const columns = this.columns.length;
    const left = 14 + Math.max(0, ...names.map((name) => context.measureText(name).width));
    const wide = Math.max(0, ...titles.map((title) => context.measureText(title).width));
    const width = Math.max(2, Math.min(72, (board.width - left - 8) / Math.max(columns, 1)));
    const isSteep = this.columns.some((column) => column.part) && wide > width - 6; // names of parts stand upright where they are too long
    const top = isSteep ? Math.min(wide, 110) + 16 : 30;
    const height = Math.max(2, Math.min(52, (board.height - top - 8) / Math.max(this.rows.length, 1)));
    this.frame = { left, top, width, height };
    let most = 0;
    let mark = "";
    for (const cell of this.grid) {
      if (cell < 0) continue;
      const { value, isEstimated } = this.amount(cell);
      most = Math.max(most, value || 0);
      if (isEstimated && value >= 0) mark = "≈ ";
    }
    if (app.state.metric === "imbalance" && most > 0) most = Math.max(most, 0.01);
    const text = mark + this.wordOf(most);
    const dashes = this.columns.some(({ layer, part }) => layer < 0 && !part) ? ` · –: in no ${this.columns.some(({ part }) => part) ? "module" : "layer"}` : "";
    if (most) tellScale(this.scale, this.describe(), ["0", text], { isEstimated: mark !== "", after: ` (root scale)${dashes}` });
    else tellScale(this.scale, `${this.describe()}: unknown`, null);
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    context.fillStyle = colours.quiet;
    context.textAlign = "center";
    this.drawTitles(titles, isSteep);
    const marked = this.markedCells();
    this.rows.forEach((_, at) => {
      const y = top + at * height;
      context.fillStyle = colours.quiet;
      if (height >= 9) context.fillText(names[at], 4, y + height / 2);
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
          if (width >= 32 && height >= 16 && passes) {
            context.fillStyle = isEstimated ? colours.ink : inkOn(share);
            context.font = `10px ${FONT}`;
            this.writeIn(this.wordOf(value), x + 4, y + height / 2, width - 6, height);
            context.font = `11px ${FONT}`;
          }
        } else if (app.state.metric !== "waiting" || app.model.cells.sent_bytes[cell] > 0) {
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

  /** Name the columns: numbers where there is room for them, names upright where there is none. @param {string[]} titles @param {boolean} isSteep */
  drawTitles(titles, isSteep) {
    const { context } = this.board;
    const { left, top, width } = this.frame;
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    context.fillStyle = this.app.colours.quiet;
    const every = isSteep ? Math.ceil(13 / width) : Math.ceil(22 / width);
    titles.forEach((title, column) => {
      if (column % every && this.columns[column].layer >= 0) return;
      if (isSteep && column % every) return;
      context.save();
      context.translate(left + (column + 0.5) * width, top - 10);
      if (isSteep) context.rotate(-Math.PI / 2);
      context.textAlign = isSteep ? "left" : "center";
      context.fillText(isSteep ? fit(context, title, top - 14) : title === "–" && width > 56 ? "no layer" : title, 0, 0);
      context.restore();
    });
    context.textAlign = "left";
  }

  /** Write an amount into a cell, its unit below it where both do not fit side by side. @param {string} text @param {number} x @param {number} y @param {number} width @param {number} height */
  writeIn(text, x, y, width, height) {
    const { context } = this.board;
    if (context.measureText(text).width <= width) {
      context.fillText(text, x, y);
      return;
    }
    const lines = text.split(" ");
    if (height < 13 * lines.length || lines.some((line) => context.measureText(line).width > width)) return;
    lines.forEach((line, at) => context.fillText(line, x, y + 12 * (at - (lines.length - 1) / 2)));
  }

  /** @param {number} value */
  wordOf(value) {
    const { metric } = this.app.state;
    if (metric === "bytes") return writeBytes(value);
    if (metric === "nodes") return writeCount(value);
    return metric === "imbalance" ? writeExcess(value) : writeTime(value);
  }

  describe() {
    return {
      time: "time on a rank, mean", waiting: "waiting for others on a rank, mean", bytes: "bytes given to communications",
      imbalance: "slowest rank above the mean", nodes: "nodes of the graph", path: "time on the critical path",
    }[this.app.state.metric] ?? "";
  }

  markedCells() {
    const { marks, model, state } = this.app;
    const found = new Set();
    if (state.selection?.kind === "cell") return found.add(state.selection.id);
    if (!marks.leaves.length) return found;
    const wanted = new Set();
    for (const [low, high] of marks.leaves) for (let leaf = low; leaf < high; leaf++) wanted.add(model.placeOf(model.leaves, leaf));
    for (let cell = 0; cell < model.cells.length; cell++) if (wanted.has(model.placeOf(model.cells, cell))) found.add(cell);
    return found;
  }

  /** @param {number} x @param {number} y */
  at(x, y) {
    if (!this.frame) return -1;
    const column = Math.floor((x - this.frame.left) / this.frame.width);
    const row = Math.floor((y - this.frame.top) / this.frame.height);
    if (column < 0 || row < 0 || column >= this.columns.length || row >= this.rows.length) return -1;
    return this.grid[row * this.columns.length + column];
  }

  /** @param {number} cell */
  tell(cell) {
    const { cells } = this.app.model;
    const stage = cells.stage[cell] >= 0 ? `stage ${cells.stage[cell]}` : this.rows.some((row) => row.stage >= 0) ? "across stages" : "";
    const layer = cells.layer[cell] < 0 ? this.app.model.word(cells.part, cell) || "no layer" : `layer ${cells.layer[cell]}`;
    const guess = cells.estimated_ns[cell] >= 0 ? `mean ≈ ${writeTime(cells.estimated_ns[cell])}, max ≈ ${writeTime(cells.estimated_max_ns[cell])}` : "time unknown";
    const time = cells.mean_ns[cell] >= 0
      ? `mean ${writeTime(cells.mean_ns[cell])}, max ${writeTime(cells.max_ns[cell])} on rank ${cells.worst_rank[cell]}` : guess;
    const mark = this.app.model.meta.is_estimated ? "≈ " : "";
    const more = [
      cells.wait_ns[cell] >= 0 || cells.estimated_wait_ns[cell] >= 0 ? `waiting for others ${writeEither(cells.wait_ns[cell], cells.estimated_wait_ns[cell])}` : "",
      this.app.model.pathOfCell[cell] > 0 ? `${mark}${writeTime(this.app.model.pathOfCell[cell])} on the critical path` : "",
      cells.sent_bytes[cell] > 0 ? `${writeBytes(cells.sent_bytes[cell])} given to communications` : "",
      cells.flops[cell] > 0 ? writeFlops(cells.flops[cell]) : "",
    ];
    return [
      [stage, layer, this.app.model.word(cells.phase, cell) || "no phase told"].filter(Boolean).join(", "),
      this.app.model.hasTimes ? time : "", ...more, `${writeCount(cells.num_nodes[cell])} nodes on ${writeRanks(cells.num_ranks[cell])}`,
    ].filter(Boolean).join("\n");
  }

  /** Arrows go from cell to cell where one is selected or the matrix has the focus, else from rank to rank. @param {KeyboardEvent} event */
  key_(event) {
    const { app } = this;
    const cell = app.state.selection?.kind === "cell" ? app.state.selection.id : -1;
    if (cell < 0 && document.activeElement !== this.board.canvas) return this.map.key_(event);
    const [down, right] = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key] ?? [0, 0];
    if (event.key === "Enter" && cell >= 0) app.goTo({ kind: "cell", id: cell }, "graph");
    else if (!down && !right) return false;
    else {
      const columns = this.columns.length;
      const at = cell < 0 ? -1 : this.grid.indexOf(cell);
      let [row, column] = at < 0 ? [0, -1] : [Math.floor(at / columns), at % columns];
      do [row, column] = at < 0 ? [row, column + 1] : [row + down, column + right];
      while (row >= 0 && column >= 0 && row < this.rows.length && column < columns && this.grid[row * columns + column] < 0);
      const next = row >= 0 && column >= 0 && row < this.rows.length && column < columns ? this.grid[row * columns + column] : -1;
      if (next >= 0) app.select({ kind: "cell", id: next });
    }
    return true;
  }
}
