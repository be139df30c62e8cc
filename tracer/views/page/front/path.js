/** The critical path and the stragglers, as lists that lead to their places. */

import { drawAxis } from "./axis.js";
import { Board, FONT, fit } from "./board.js";
import { stripes } from "./palette.js";
import { writeCount, writeTime } from "./text.js";

const PAGE = 200; // rows at a time
const MOST_ROWS = 16; // ranks that the strip has all of
const LEFT = 92;
const TOP = 30;
const MOST_TOTALS = 40; // rows; the others are one

export class PathView {
  /**
   * @param {HTMLElement} place
   * @param {import("./app.js").App} app
   */
  constructor(place, app) {
    this.app = app;
    this.tools = app.tools(place, []);
    this.note = app.note(this.tools);
    this.shown = PAGE;
    this.shownLate = PAGE;
    /** @type {number[] | null} */
    this.onPath = null;
    this.key = "";
    const { pieces, meta } = app.model;
    if (!pieces) {
      const why = document.createElement("p");
      why.className = "empty";
      why.textContent = `No critical path: ${meta.no_path || "nothing has a time"}.`;
      place.append(why);
      return;
    }
    const strip = document.createElement("div");
    strip.className = "board strip";
    place.append(strip);
    this.board = new Board(strip, "The critical path over time and ranks", {
      draw: () => this.draw(),
      hover: (x) => { const piece = this.at(x); return piece < 0 ? null : this.tell(piece); },
      click: (x) => { const piece = this.at(x); app.select(piece < 0 ? null : { kind: "piece", id: piece }); },
      double: (x) => { const piece = this.at(x); if (piece >= 0) app.goTo({ kind: "piece", id: piece }, "time"); },
      drag: (x, y, dx) => this.move(-dx / this.sight().width),
      wheel: (x, y, event) => {
        const { left, width, from, to } = this.sight();
        app.views.time.zoom(from + ((x - left) / width) * (to - from), Math.exp(event.deltaY * 0.002));
      },
    });
    const panels = document.createElement("div");
    panels.className = "panels lists";
    place.append(panels);
    this.totals = app.panel(panels, `Where the ${app.model.steps.length > 1 ? "steps'" : "step's"} time went`, "list");
    this.list = app.panel(panels, "Longest pieces of the path", "list");
    this.late = app.panel(panels, "Stragglers: who came last", "list");
  }

  fill() {
    this.fillTotals();
    this.fillPieces();
    this.fillStragglers();
    const { model } = this.app;
    const { steps } = model;
    this.note.textContent = steps.map((/** @type {any} */ step) => {
      const error = step.is_estimated || step.error_ns === 0 ? "" : step.error_ns === null ? ", clock error unknown" : ` ± ${writeTime(step.error_ns)}`;
      const mark = step.is_estimated ? "≈ " : "";
      return `${step.step === null ? "" : `step ${step.step}: `}${mark}${writeTime(step.end_ns - step.start_ns)}${error}`;
    }).join(" · ") + ` · ${writeCount(model.pieces.length)} pieces`;
  }

  fillTotals() {
    const { app } = this;
    const { pieces, leaves } = app.model;
    const totals = new Map();
    let whole = 0;
    for (let at = 0; at < pieces.length; at++) {
      if (!this.passes(pieces.leaf[at], pieces.rank[at])) continue;
      const spent = app.model.word(pieces.spent, at);
      const key = `${spent} · ${spent === "host" ? "before operators" : app.model.word(leaves.label, pieces.leaf[at])}`;
      const span = pieces.end_ns[at] - pieces.start_ns[at];
      totals.set(key, (totals.get(key) ?? 0) + span);
      whole += span;
    }
    const table = document.createElement("table");
    table.append(app.row(["Spent on", "Time", "Share"], "th"));
    const sorted = [...totals].sort((one, other) => other[1] - one[1]);
    for (const [key, span] of sorted.slice(0, MOST_TOTALS)) {
      const row = app.row([soften(key), this.mark() + writeTime(span), `${((100 * span) / whole).toFixed(1)} %`], "td", 0);
      row.cells[0].prepend(app.swatch(key.split(" ")[0]));
      table.append(row);
    }
    const rest = sorted.slice(MOST_TOTALS);
    if (rest.length) {
      const span = rest.reduce((sum, [, one]) => sum + one, 0);
      table.append(app.row([`${writeCount(rest.length)} others`, this.mark() + writeTime(span), `${((100 * span) / whole).toFixed(1)} %`], "td", 0));
    }
    this.totals?.body.replaceChildren(table);
  }

  /** A wave where times are estimates. */
  mark() {
    return this.app.model.meta.is_estimated ? "≈ " : "";
  }

  fillPieces() {
    const { app } = this;
    const { pieces, leaves } = app.model;
    const order = Array.from({ length: pieces.length }, (_, at) => at).filter((at) => this.passes(pieces.leaf[at], pieces.rank[at]))
      .sort((one, other) => (pieces.end_ns[other] - pieces.start_ns[other]) - (pieces.end_ns[one] - pieces.start_ns[one]));
    const table = document.createElement("table");
    table.append(app.row(["At", "Rank", "What", "Time"], "th"));
    for (const at of order.slice(0, this.shown)) {
      const what = `${app.model.word(pieces.spent, at) === "host" ? "host, before " : ""}${app.model.word(leaves.label, pieces.leaf[at])}`;
      const row = app.row([pieces.start_ns[at] ? this.mark() + writeTime(pieces.start_ns[at]) : "0", String(pieces.rank[at]), soften(what), this.mark() + writeTime(pieces.end_ns[at] - pieces.start_ns[at])], "td", 2);
      row.cells[2].append(below(app.shortPlace(pieces.leaf[at])));
      row.cells[2].prepend(app.swatch(app.model.word(pieces.spent, at)));
      row.dataset.piece = String(at);
      app.makeChoice(row, () => app.select({ kind: "piece", id: at }), () => app.goTo({ kind: "piece", id: at }, "time"));
      table.append(row);
    }
    const { list } = this;
    list?.body.replaceChildren(table);
    if (list && order.length > this.shown) {
      list.body.append(app.button(`${PAGE} more of ${writeCount(order.length)}`, "", () => { this.shown += PAGE; this.fillPieces(); app.render(); }));
    }
  }

  fillStragglers() {
    const { app } = this;
    const { stragglers, meta } = app.model;
    const left = meta.num_stragglers - (stragglers?.length ?? 0);
    const table = document.createElement("table");
    table.append(app.row(["Came last", "To", "All waited"], "th"));
    const passing = Array.from({ length: stragglers?.length ?? 0 }, (_, at) => at).filter((at) => this.passes(stragglers.leaf[at], stragglers.rank[at]));
    for (const at of passing.slice(0, this.shownLate)) {
      const held = stragglers.held_rank[at] >= 0
        ? `${app.model.word(stragglers.held_spent, at)} ${app.model.word(stragglers.held_label, at)}${stragglers.held_rank[at] === stragglers.rank[at] ? "" : ` on rank ${stragglers.held_rank[at]}`}, ${this.mark()}${writeTime(stragglers.held_ns[at])}`
        : "";
      const row = app.row([`rank ${stragglers.rank[at]}`, app.model.word(stragglers.label, at), this.mark() + writeTime(stragglers.waited_ns[at])], "td", 1);
      row.cells[1].append(below(app.shortPlace(stragglers.leaf[at])), ...(held ? [below(`held up by ${held}`)] : []));
      row.dataset.straggler = String(at);
      app.makeChoice(row, () => app.select({ kind: "straggler", id: at }), () => app.goTo({ kind: "straggler", id: at }, "time"));
      table.append(row);
    }
    const { late } = this;
    late?.body.replaceChildren(table);
    if (!stragglers?.length) late?.body.append(app.empty("Nobody waited for anybody."));
    if (late) late.note.textContent = left > 0 ? `${writeCount(left)} others, who were waited for less, are not in this page: truedag critical-path --top` : "";
    if (passing.length > this.shownLate) {
      late?.body.append(app.button(`${PAGE} more of ${writeCount(passing.length)}`, "", () => { this.shownLate += PAGE; this.fillStragglers(); app.render(); }));
    }
  }

  /** @param {number} leaf @param {number} rank */
  passes(leaf, rank) {
    const { filter } = this.app;
    return !filter.isOn || (Boolean(this.app.leavesPassing()[leaf]) && (!filter.ranks || filter.ranks.has(rank)));
  }

  draw() {
    const { app } = this;
    if (!this.board) return;
    const key = JSON.stringify(app.state.filters);
    if (key !== this.key) {
      this.key = key;
      this.fill();
    }
    for (const row of document.querySelectorAll("tr[data-piece], tr[data-straggler]")) {
      const data = /** @type {HTMLElement} */ (row).dataset;
      const { selection } = app.state;
      row.classList.toggle("chosen", (selection?.kind === "piece" && data.piece === String(selection.id)) ||
        (selection?.kind === "straggler" && data.straggler === String(selection.id)));
    }
    this.drawStrip();
  }

  /** What is on screen of the strip: the same time as in the view of time. */
  sight() {
    const { width, height } = /** @type {Board} */ (this.board);
    const { model, state } = this.app;
    const [from, to] = state.window ?? model.meta.window_ns;
    return { left: LEFT, top: TOP, width: Math.max(1, width - LEFT - 10), height: Math.max(1, height - TOP - 22), from, to };
  }

  /** Ranks on the strip: all where they are few, else those that the path runs on. @returns {number[]} */
  ranks() {
    const { ranks, pieces } = this.app.model;
    this.onPath ??= [...new Set(ranks.length > MOST_ROWS ? pieces.rank : ranks.rank)].sort((one, other) => one - other);
    return this.onPath;
  }

  drawStrip() {
    const { app } = this;
    const { context, width, height } = /** @type {Board} */ (this.board);
    const { pieces } = app.model;
    const { colours, state, marks } = app;
    const sight = this.sight();
    const ranks = this.ranks();
    const rowOf = new Map(ranks.map((rank, row) => [rank, row]));
    const perNs = sight.width / (sight.to - sight.from);
    const line = sight.height / Math.max(1, ranks.length);
    drawAxis(context, sight, colours);
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    context.fillStyle = colours.open;
    context.fillRect(sight.left, sight.top, sight.width, sight.height);
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(13 / line));
    for (let row = 0; row < ranks.length; row += every) {
      context.fillStyle = marks.ranks.has(ranks[row]) ? colours.ink : colours.quiet;
      context.fillText(`rank ${ranks[row]}`, sight.left - 8, sight.top + (row + 0.5) * line);
    }
    context.textAlign = "left";
    context.save();
    context.beginPath();
    context.rect(sight.left, sight.top - 2, sight.width, sight.height + 4);
    context.clip();
    let before = -1;
    for (let at = 0; at < pieces.length; at++) {
      const row = rowOf.get(pieces.rank[at]) ?? 0;
      const last = before;
      before = row;
      if (pieces.end_ns[at] < sight.from || pieces.start_ns[at] > sight.to) continue;
      const x = sight.left + (pieces.start_ns[at] - sight.from) * perNs;
      const w = Math.max(0.7, (pieces.end_ns[at] - pieces.start_ns[at]) * perNs);
      if (last >= 0 && last !== row) {
        context.strokeStyle = colours.quiet;
        context.globalAlpha = 0.5;
        context.beginPath();
        context.moveTo(x, sight.top + (last + 0.5) * line);
        context.lineTo(x, sight.top + (row + 0.5) * line);
        context.stroke();
        context.globalAlpha = 1;
      }
      const colour = colours.kinds[app.model.word(pieces.spent, at)] ?? colours.quiet;
      context.globalAlpha = this.passes(pieces.leaf[at], pieces.rank[at]) ? 1 : 0.15;
      context.fillStyle = app.model.meta.is_estimated ? stripes(context, colour, colours.open) : colour;
      context.fillRect(x, sight.top + row * line + Math.min(2, line * 0.15), w, Math.max(1.5, line * 0.7));
      context.globalAlpha = 1;
      if (state.selection?.kind === "piece" && state.selection.id === at) {
        context.strokeStyle = colours.accent;
        context.lineWidth = 2;
        context.strokeRect(x - 1, sight.top + row * line, Math.max(4, w) + 2, Math.max(4, line));
        context.lineWidth = 1;
      }
    }
    if (marks.window && state.selection?.kind === "straggler") {
      const [x0, x1] = marks.window.map((time) => sight.left + (time - sight.from) * perNs);
      context.strokeStyle = colours.accent;
      context.strokeRect(x0 - 1, sight.top, Math.max(3, x1 - x0) + 2, sight.height);
    }
    context.restore();
    context.fillStyle = colours.quiet;
    context.fillText(fit(context, `${ranks.length < app.model.ranks.length ? "The ranks that the path runs on" : "Which rank the path runs on"}; it goes to another where that was waited for. Wheel or + − zooms, dragging moves, 0 shows all.`, width - LEFT), LEFT, height - 9);
  }

  /** @param {number} x @returns {number} */
  at(x) {
    const { pieces } = this.app.model;
    const sight = this.sight();
    if (x < sight.left) return -1;
    const time = sight.from + ((x - sight.left) / sight.width) * (sight.to - sight.from);
    let low = 0;
    let high = pieces.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (pieces.end_ns[middle] < time) low = middle + 1;
      else high = middle;
    }
    return time <= (pieces.end_ns[low] ?? -1) ? low : -1;
  }

  /** @param {number} piece */
  tell(piece) {
    const { pieces, leaves } = this.app.model;
    return `${this.app.model.word(pieces.spent, piece)} on rank ${pieces.rank[piece]}, ${this.mark()}${writeTime(pieces.end_ns[piece] - pieces.start_ns[piece])}\n${this.app.model.word(leaves.label, pieces.leaf[piece])} · ${this.app.shortPlace(pieces.leaf[piece])}`;
  }

  /** @param {KeyboardEvent} event */
  key_(event) {
    const { app } = this;
    if (!app.model.pieces) return false;
    const at = app.state.selection?.kind === "piece" ? app.state.selection.id : -1;
    const step = { ArrowRight: 1, n: 1, ArrowLeft: -1, p: -1 }[event.key];
    if (step !== undefined) this.step(Math.min(Math.max(at + step, 0), app.model.pieces.length - 1));
    else if (event.key === "Enter" && app.state.selection) app.goTo(app.state.selection, "time");
    else if (["+", "=", "-", "0"].includes(event.key)) app.views.time.key_(event);
    else return false;
    return true;
  }

  /** Select a piece and bring it into sight. @param {number} at */
  step(at) {
    const { app } = this;
    const [begin, end] = [app.model.pieces.start_ns[at], app.model.pieces.end_ns[at]];
    const { from, to } = this.sight();
    if (end < from || begin > to) this.move(((begin + end) / 2 - (from + to) / 2) / (to - from));
    app.select({ kind: "piece", id: at });
  }

  /** Show another time. @param {number} share of what is on screen */
  move(share) {
    const { from, to } = this.sight();
    this.app.change((state) => { state.window = this.app.views.time.clip(from + share * (to - from), to + share * (to - from)); });
  }
}

/** Let a long name go on in the next line behind its signs. @param {string} text */
function soften(text) {
  return text.replace(/_|\.(?=[a-z])/gi, "$&\u200b");
}

/** A smaller line in a cell. @param {string} text */
function below(text) {
  return Object.assign(document.createElement("span"), { className: "below", textContent: soften(text) });
}
