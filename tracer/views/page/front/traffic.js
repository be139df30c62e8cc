/** Who gave how much to whom: messages as observed, collectives shared out evenly, which is an estimate and looks so. */

import { Board, FONT } from "./board.js";
import { tellScale } from "./controls.js";
import { amountChannels } from "./palette.js";
import { writeBytes, writeCount, writeTime } from "./text.js";
import { eachRun } from "./model.js";

const MOST_CELLS = 700; // cells on a side; more ranks share a cell
const MOST_OUTLINED = 4; // ranks whose rows and columns are framed; of more, their places at the edges are marked
const EDGE = 64;

export class TrafficView {
  /**
   * @param {HTMLElement} place
   * @param {import("./app.js").App} app
   */
  constructor(place, app) {
    this.app = app;
    this.tools = app.tools(place, []);
    this.note = app.note(this.tools);
    const panels = document.createElement("div");
    panels.className = "panels";
    place.append(panels);
    const matrix = app.panel(panels, "From rank (row) to rank (column)", "square");
    this.scale = matrix.note;
    this.board = new Board(matrix.body, "Bytes from rank to rank", {
      draw: () => this.draw(),
      hover: (x, y) => this.hover(x, y),
      click: (x, y) => { const [from] = this.at(x, y); app.select(from < 0 ? null : { kind: "rank", id: from }); },
    });
    const list = app.panel(panels, "By axis and kind", "list");
    this.table = document.createElement("table");
    list.body.append(this.table);
    /** @type {Map<number, number>} */
    this.rowOfGroup = new Map();
    /** @type {number[]} */
    this.ranks = [];
    this.fold = 1; // ranks in a cell
    for (let row = 0; row < app.model.groups.length; row++) this.rowOfGroup.set(app.model.groups.group[row], row);
    /** @type {any[]} */
    this.kinds = [];
    this.key = "";
  }

  /** Totals by axis and kind, of what the ranks that pass the filter gave. */
  total() {
    const { model, filter } = this.app;
    const { collectives, groups, messages } = model;
    const totals = new Map();
    for (let at = 0; at < (collectives?.length ?? 0); at++) {
      if (filter.ranks && !filter.ranks.has(collectives.rank[at])) continue;
      const row = this.rowOfGroup.get(collectives.group[at]);
      const axis = (row === undefined ? "" : model.word(groups.axis, row)) || "unnamed group";
      const kind = model.word(collectives.kind, at) || "collective";
      const key = `${axis} ${kind}`;
      let total = totals.get(key);
      if (!total) totals.set(key, (total = { key, axis, kind, num: 0, bytes: 0, wait: 0, transfer: 0, parts: 0, groups: new Map(), isMessage: false }));
      total.bytes += collectives.bytes[at] || 0;
      total.wait += collectives.wait_ns[at];
      total.transfer += collectives.transfer_ns[at];
      total.parts += collectives.num[at];
      total.groups.set(collectives.group[at], Math.max(total.groups.get(collectives.group[at]) ?? 0, collectives.num[at]));
    }
    for (const total of totals.values()) total.num = [...total.groups.values()].reduce((sum, number) => sum + number, 0);
    let bytes = 0;
    let num = 0;
    for (let at = 0; at < (messages?.length ?? 0); at++) {
      if (filter.ranks && !filter.ranks.has(messages.source[at])) continue;
      bytes += messages.bytes[at];
      num += messages.num[at];
    }
    if (num) totals.set("messages", { key: "messages", axis: "", kind: "messages", num, bytes, wait: NaN, transfer: NaN, parts: num, groups: new Map(), isMessage: true });
    return [...totals.values()].sort((one, other) => other.bytes - one.bytes);
  }

  fill() {
    const { app } = this;
    const { hasTimes } = app.model;
    this.table.replaceChildren(app.row(["Axis", "Kind", "Number", "Bytes given", ...(hasTimes ? ["Mean wait", "Mean transfer"] : [])], "th"));
    const time = (/** @type {number} */ sum, /** @type {any} */ total) => {
      if (total.isMessage) return "–";
      return (app.model.meta.is_estimated && sum >= 0 ? "≈ " : "") + writeTime(sum / total.parts);
    };
    for (const total of this.kinds) {
      const times = hasTimes ? [time(total.wait, total), time(total.transfer, total)] : [];
      const row = app.row([total.axis || "–", total.kind, writeCount(total.num), writeBytes(total.bytes), ...times], "td");
      app.makeChoice(row, () => app.change((state) => { state.traffic = state.traffic === total.key ? "" : total.key; }));
      row.dataset.key = total.key;
      this.table.append(row);
    }
  }

  /** Bytes from rank to rank, of what is chosen. */
  refresh() {
    const { model, state, filter } = this.app;
    const key = `${state.traffic} ${state.filters.rank}`;
    if (key === this.key && this.cells) return;
    this.key = key;
    this.kinds = this.total();
    this.fill();
    const ranks = Array.from(/** @type {Iterable<number>} */ (model.ranks.rank)).filter((rank) => !filter.ranks || filter.ranks.has(rank));
    this.ranks = ranks;
    this.fold = 1;
    while (ranks.length / this.fold > MOST_CELLS) this.fold *= 2; // as groups are, so that cells do not straddle them
    const side = Math.ceil(ranks.length / this.fold);
    this.side = side;
    this.cells = new Float64Array(side * side);
    this.observed = new Float64Array(side * side);
    const placeOf = new Map(ranks.map((rank, at) => [rank, Math.floor(at / /** @type {number} */ (this.fold))]));
    const { messages, collectives, groups } = model;
    if (!state.traffic || state.traffic === "messages") {
      for (let at = 0; at < (messages?.length ?? 0); at++) {
        const from = placeOf.get(messages.source[at]);
        const to = placeOf.get(messages.destination[at]);
        if (from === undefined || to === undefined) continue;
        this.cells[from * side + to] += messages.bytes[at];
        this.observed[from * side + to] += messages.bytes[at];
      }
    }
    const wanted = this.kinds.find((total) => total.key === state.traffic);
    for (let at = 0; at < (collectives?.length ?? 0); at++) {
      if (state.traffic && (!wanted || wanted.isMessage || !wanted.groups.has(collectives.group[at]) || wanted.kind !== (model.word(collectives.kind, at) || "collective"))) continue;
      const from = placeOf.get(collectives.rank[at]);
      const row = this.rowOfGroup.get(collectives.group[at]);
      if (from === undefined || row === undefined || !(collectives.bytes[at] > 0)) continue;
      const runs = model.runs(groups.ranks, row);
      let others = -1;
      eachRun(runs, () => { others++; });
      if (others < 1) continue;
      const share = collectives.bytes[at] / others;
      eachRun(runs, (rank) => {
        const to = placeOf.get(rank);
        if (to !== undefined && rank !== collectives.rank[at]) /** @type {Float64Array} */ (this.cells)[from * side + to] += share;
      });
    }
    this.most = this.cells.reduce((most, value) => Math.max(most, value), 0);
  }

  draw() {
    this.refresh();
    const { board, app } = this;
    const { context } = board;
    const { colours, marks, state } = app;
    const side = this.side ?? 1;
    const room = Math.min(board.width - EDGE - 10, board.height - 34);
    const size = room / side;
    this.frame = { left: EDGE, top: 24, size };
    for (const row of this.table.querySelectorAll("tr[data-key]")) {
      row.classList.toggle("chosen", /** @type {HTMLElement} */ (row).dataset.key === state.traffic);
    }
    const image = new ImageData(side, side);
    const ground = [1, 3, 5].map((at) => parseInt(colours.open.slice(at, at + 2), 16));
    const least = Math.log(Math.max(this.leastPositive(), 1));
    const span = Math.max(Math.log(Math.max(this.most ?? 1, 2)) - least, 0.7);
    for (let at = 0; at < side * side; at++) {
      const value = this.cells?.[at] ?? 0;
      const colour = value > 0 ? amountChannels(0.12 + (0.88 * (Math.log(value) - least)) / span) : ground;
      image.data.set([colour[0], colour[1], colour[2], 255], 4 * at);
    }
    const tile = document.createElement("canvas");
    tile.width = tile.height = side;
    /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d")).putImageData(image, 0, 0);
    context.imageSmoothingEnabled = side > room;
    context.drawImage(tile, EDGE, 24, room, room);
    this.hatchShared(size, side);
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    const every = Math.max(1, Math.ceil((12 + 7 * String(this.ranks?.length ?? 0).length) / size));
    for (let at = 0; at < side; at++) {
      const rank = this.ranks?.[at * (this.fold ?? 1)] ?? 0;
      const isMarked = this.fold === 1 ? marks.ranks.has(rank) : this.ranks?.slice(at * this.fold, (at + 1) * this.fold).some((one) => marks.ranks.has(one));
      if (isMarked) {
        context.fillStyle = colours.accent;
        context.fillRect(EDGE - 5, 24 + at * size, 4, Math.max(1, size));
        context.fillRect(EDGE + at * size, 19, Math.max(1, size), 4);
      }
      if (isMarked && marks.ranks.size <= MOST_OUTLINED) {
        context.strokeStyle = colours.accent;
        context.lineWidth = Math.max(1, Math.min(2, size / 3));
        context.strokeRect(EDGE, 24 + at * size, room, size);
        context.strokeRect(EDGE + at * size, 24, size, room);
        context.lineWidth = 1;
      }
      if (at % every) continue;
      context.fillStyle = colours.quiet;
      context.textAlign = "right";
      context.fillText(`rank ${rank}`, EDGE - 8, 24 + (at + 0.5) * size);
      context.textAlign = "center";
      context.fillText(String(rank), EDGE + (at + 0.5) * size, 11);
    }
    context.textAlign = "left";
    const shared = (this.fold ?? 1) > 1 ? `, ${this.fold} ranks a cell` : "";
    const striped = "striped: a collective's bytes shared out evenly, an estimate";
    if (this.most) tellScale(this.scale, `bytes${shared}`, [writeBytes(this.leastPositive()), writeBytes(this.most)], { after: ` (log scale) · ${striped}` });
    else tellScale(this.scale, "nothing was sent", null);
    const total = this.kinds.reduce((sum, one) => sum + (!state.traffic || one.key === state.traffic ? one.bytes : 0), 0);
    const given = app.filter.ranks ? "given by these ranks" : "given";
    this.note.textContent = `${state.traffic || "all communications"}: ${writeBytes(total)} ${given} · ${app.onlyRanks() || "click a row of the table to see one kind"}`;
  }

  leastPositive() {
    let least = Infinity;
    for (const value of this.cells ?? []) if (value > 0 && value < least) least = value;
    return Number.isFinite(least) ? least : 1;
  }

  /** Stripes over what is shared out. @param {number} size @param {number} side */
  hatchShared(size, side) {
    const { context } = this.board;
    context.strokeStyle = this.app.colours.paper;
    context.globalAlpha = 0.55;
    context.lineWidth = Math.min(1.4, Math.max(0.5, size / 12));
    context.save();
    context.beginPath();
    for (let from = 0; from < side; from++) {
      for (let to = 0; to < side; to++) {
        const at = from * side + to;
        if ((this.cells?.[at] ?? 0) > (this.observed?.[at] ?? 0)) context.rect(EDGE + to * size, 24 + from * size, size, size);
      }
    }
    context.clip();
    context.beginPath();
    const room = size * side;
    for (let x = -room; x < room; x += 6) {
      context.moveTo(EDGE + x, 24 + room);
      context.lineTo(EDGE + x + room, 24);
    }
    context.stroke();
    context.restore();
    context.globalAlpha = 1;
    context.lineWidth = 1;
  }

  /** @param {number} x @param {number} y @returns {[number, number]} */
  at(x, y) {
    if (!this.frame || !this.ranks) return [-1, -1];
    const to = Math.floor((x - this.frame.left) / this.frame.size);
    const from = Math.floor((y - this.frame.top) / this.frame.size);
    const side = this.side ?? 0;
    if (from < 0 || to < 0 || from >= side || to >= side) return [-1, -1];
    return [this.ranks[from * (this.fold ?? 1)], this.ranks[to * (this.fold ?? 1)]];
  }

  /** @param {number} x @param {number} y */
  hover(x, y) {
    const [from, to] = this.at(x, y);
    if (from < 0 || !this.frame) return null;
    const at = Math.floor((y - this.frame.top) / this.frame.size) * (this.side ?? 1) + Math.floor((x - this.frame.left) / this.frame.size);
    const all = this.cells?.[at] ?? 0;
    const sure = this.observed?.[at] ?? 0;
    const shared = (this.fold ?? 1) > 1 ? ` (and the next ${(this.fold ?? 1) - 1})` : "";
    const parts = [sure > 0 ? `${writeBytes(sure)} in messages` : "", all > sure ? `≈ ${writeBytes(all - sure)} in collectives, shared out evenly` : ""].filter(Boolean);
    return [`rank ${from} to rank ${to}${shared}`, ...(parts.length ? parts : ["nothing"])].join("\n");
  }

  /** @param {KeyboardEvent} event */
  key_(event) {
    return this.app.views.overview.map.key_(event);
  }
}
