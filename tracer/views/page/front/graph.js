/** The folded graph: boxes that open, from stage to layer to module to operator. */

import { Board } from "./board.js";
import { drawBox, drawFrame, figureOf, multiplicity } from "./boxes.js";
import { drawTies } from "./ties.js";
import { layOut } from "./layout.js";
import { writeCount } from "./text.js";

const SMALLEST = 0.02;
const LARGEST = 3;

export class GraphView {
  /**
   * @param {HTMLElement} place
   * @param {import("./app.js").App} app
   */
  constructor(place, app) {
    this.app = app;
    this.tools = app.tools(place, [
      app.metricChoice(),
      app.checkbox("Parameters, inputs, outputs", () => app.state.ends, (on) => app.change((state) => { state.ends = on; state.camera = null; })),
      app.button("Fit", "0", () => app.change((state) => { state.camera = null; })),
      app.button("Close all", "", () => app.change((state) => { state.open.clear(); state.camera = null; })),
    ]);
    this.note = app.note(this.tools);
    const holder = document.createElement("div");
    holder.className = "board";
    place.append(holder);
    this.board = new Board(holder, "The folded graph", {
      draw: () => this.draw(),
      hover: (x, y) => this.hover(x, y),
      click: (x, y) => this.click(x, y),
      double: (x, y) => { const box = this.at(x, y); if (box) this.toggle(box.node); },
      drag: (x, y, dx, dy) => this.pan(dx, dy),
      wheel: (x, y, event) => this.wheel(x, y, event),
    });
    /** @type {import("./layout.js").Layout | null} */
    this.layout = null;
    this.key = "";
    this.wanted = "";
    this.passing = new Uint8Array(0);
    /** How many nodes the leaves that pass stand for, before each leaf of the walk. */
    this.nodesBefore = new Float64Array(app.model.numLeaves + 1);
    /** How long the last opening took until it was drawn, in ms. */
    this.openingMs = 0;
  }

  /** Lay out again if what is open or filtered has changed. */
  refresh() {
    const { state, model, filter } = this.app;
    const key = JSON.stringify([[...state.open].sort(), state.ends, state.filters]);
    if (key === this.key && this.layout) return;
    this.key = key;
    const wanted = JSON.stringify([state.ends, state.filters]);
    if (wanted !== this.wanted) {
      this.passing = model.passing(filter, state.ends);
      for (let leaf = 0; leaf < model.numLeaves; leaf++) {
        this.nodesBefore[leaf + 1] = this.nodesBefore[leaf] + this.passing[leaf] * model.tree.num_nodes[model.leaves.node[leaf]];
      }
    }
    this.wanted = wanted;
    this.layout = layOut(model, state.open, this.passing);
    this.note.textContent = this.count();
  }

  /** What is on screen of how much. */
  count() {
    const { model, state } = this.app;
    const { tree, meta } = model;
    const boxes = this.layout?.boxes ?? [];
    let shown = 0;
    for (const box of boxes) {
      if (box.isOpen) continue;
      shown += this.nodesBefore[tree.high[box.node]] - this.nodesBefore[tree.low[box.node]];
    }
    const all = Object.values(meta.nodes).reduce((sum, count) => sum + count, 0);
    const ends = state.ends ? 0 : ["parameter", "input", "output"].reduce((sum, kind) => sum + (meta.nodes[kind] ?? 0), 0);
    const hidden = all - shown - ends;
    this.shown = shown;
    return `${writeCount(boxes.filter((box) => !box.isOpen).length)} boxes stand for ${writeCount(shown)} of ${writeCount(all)} nodes` +
      (ends ? ` · ${writeCount(ends)} not drawn` : "") +
      (hidden > 0 ? ` · ${writeCount(hidden)} filtered out` : "");
  }

  draw() {
    this.refresh();
    const { board, app, layout } = this;
    if (!layout) return;
    const [x, y, scale] = this.camera();
    const { context } = board;
    context.save();
    context.translate(x, y);
    context.scale(scale, scale);
    const sight = { left: -x / scale, top: -y / scale, right: (board.width - x) / scale, bottom: (board.height - y) / scale };
    const marked = this.markedBoxes();
    const look = (/** @type {number} */ node) => ({ isSelected: this.isSelected(node), isMarked: marked.has(node) });
    for (const box of layout.boxes) {
      if (box.isOpen && isSeen(box, sight)) drawFrame(context, app, box, scale, look(box.node));
    }
    drawTies(context, layout, sight, scale, app.colours, this.focus());
    const most = this.largest();
    for (const box of layout.boxes) {
      if (!box.isOpen && isSeen(box, sight)) drawBox(context, app, box, scale, look(box.node), most.get(app.model.tree.parent[box.node]) ?? 0);
    }
    context.restore();
    if (!layout.boxes.length) app.sayOn(board, "Nothing passes the filters.");
  }

  /** @returns {[number, number, number]} */
  camera() {
    if (this.app.state.camera) return this.app.state.camera;
    const { layout, board } = this;
    if (!layout || !layout.width) return [0, 0, 1];
    const scale = Math.min((board.width - 48) / layout.width, (board.height - 48) / layout.height, 1.15);
    return [(board.width - layout.width * scale) / 2, Math.max(24, (board.height - layout.height * scale) / 2), scale];
  }

  /** @param {number} node */
  nameOf(node) {
    return this.app.model.title(node);
  }

  /** The largest amount in each open box, that bars are drawn to: what lies side by side is compared. */
  largest() {
    const { model, state } = this.app;
    /** @type {Map<number, number>} */
    const most = new Map();
    for (const { node } of this.layout?.boxes ?? []) {
      const { value } = model.amount(node, state.metric);
      const parent = model.tree.parent[node];
      if (value > (most.get(parent) ?? 0)) most.set(parent, value);
    }
    return most;
  }

  /** Boxes that hold something marked. */
  markedBoxes() {
    const { marks, model, state } = this.app;
    const found = new Set();
    if (!state.selection || state.selection.kind === "node") return found;
    for (const box of this.layout?.boxes ?? []) {
      const low = model.tree.low[box.node];
      const high = model.tree.high[box.node];
      if (marks.leaves.some(([from, to]) => from < high && to > low)) found.add(box.node);
    }
    return found;
  }

  /** Which box's edges stand out; -1 none. */
  focus() {
    const { state } = this.app;
    if (state.selection?.kind !== "node") return -1;
    const at = this.layout?.boxOf.get(state.selection.id) ?? -1;
    return this.layout?.boxes[at]?.isOpen ? -1 : at; // edges end at what is in an open box
  }

  /** @param {number} node */
  isSelected(node) {
    const { selection } = this.app.state;
    return selection?.kind === "node" && selection.id === node;
  }

  /** The innermost box at a point. @param {number} x @param {number} y */
  at(x, y) {
    const [cx, cy, scale] = this.camera();
    const px = (x - cx) / scale;
    const py = (y - cy) / scale;
    let found = null;
    for (const box of this.layout?.boxes ?? []) {
      if (px >= box.x && px <= box.x + box.width && py >= box.y && py <= box.y + box.height) found = box;
    }
    return found;
  }

  /** @param {number} x @param {number} y */
  hover(x, y) {
    const box = this.at(x, y);
    if (!box) return null;
    return box.isOpen ? "" : `${this.app.model.path(box.node).join(" / ")}\n${multiplicity(this.app.model, box.node)}\n${figureOf(this.app.model, box.node, this.app.state.metric)}`;
  }

  /** @param {number} x @param {number} y */
  click(x, y) {
    const box = this.at(x, y);
    this.app.select(box ? { kind: "node", id: box.node } : null);
    if (!box) return;
    const [cx, , scale] = this.camera();
    const caret = (x - cx) / scale - box.x < 26;
    if (caret && !this.app.model.isLeaf[box.node]) this.toggle(box.node);
  }

  /**
   * Open or close a node; what was under the pointer stays there.
   * @param {number} node
   */
  toggle(node) {
    const { app } = this;
    if (app.model.isLeaf[node]) return;
    const begin = performance.now();
    const before = this.spot(node);
    const wasFitted = !app.state.camera;
    app.change((state) => {
      const isOpen = state.open.has(node);
      // What has one box in it opens and closes with that one.
      for (let at = node, inner; ; at = inner[0]) {
        if (isOpen) state.open.delete(at);
        else state.open.add(at);
        inner = app.model.children[at];
        if (inner.length !== 1 || app.model.isLeaf[inner[0]]) break;
      }
      state.selection = { kind: "node", id: node };
    }, { now: false });
    this.refresh();
    const after = this.layout?.boxes[this.layout.boxOf.get(node) ?? -1];
    if (after && before && !(wasFitted && this.camera()[2] > 0.6)) {
      const scale = Math.max(before.scale, 0.6);
      const x = Math.max(24, Math.min(before.x, this.board.width - Math.min(after.width * scale, this.board.width - 48) - 24));
      const y = after.height * scale > this.board.height - before.y ? 24 : before.y;
      app.state.camera = [x - after.x * scale, y - after.y * scale, scale];
    }
    app.renderNow();
    this.openingMs = performance.now() - begin;
  }

  /** Where a node's box is on screen. @param {number} node */
  spot(node) {
    const box = this.layout?.boxes[this.layout.boxOf.get(node) ?? -1];
    const [x, y, scale] = this.camera();
    return box ? { x: x + box.x * scale, y: y + box.y * scale, scale } : null;
  }

  /** Open what a node is in and bring it into sight. @param {number} node */
  reveal(node) {
    const { app } = this;
    const { tree, isEnd } = app.model;
    app.change((state) => {
      for (let at = tree.parent[node]; at >= 0; at = tree.parent[at]) state.open.add(at);
      if (isEnd[tree.low[node]]) state.ends = true;
      state.selection = { kind: "node", id: node };
      state.view = "graph";
    }, { now: false });
    app.showView();
    this.refresh();
    this.centre(node);
    app.renderNow();
  }

  /** @param {number} node */
  centre(node) {
    const box = this.layout?.boxes[this.layout.boxOf.get(node) ?? -1];
    if (!box) return;
    const { clientWidth: width, clientHeight: height } = /** @type {HTMLElement} */ (this.board.canvas.parentElement);
    const scale = Math.max(0.8, Math.min(1, (width - 60) / box.width, (height - 60) / box.height));
    this.app.state.camera = [width / 2 - (box.x + box.width / 2) * scale, Math.max(24 - box.y * scale, height / 2 - (box.y + box.height / 2) * scale), scale];
  }

  /** @param {number} dx @param {number} dy */
  pan(dx, dy) {
    const [x, y, scale] = this.camera();
    this.app.change((state) => { state.camera = [x + dx, y + dy, scale]; });
  }

  /** @param {number} x @param {number} y @param {number} factor */
  zoom(x, y, factor) {
    const [cx, cy, scale] = this.camera();
    const next = Math.min(LARGEST, Math.max(SMALLEST, scale * factor));
    this.app.change((state) => { state.camera = [x - ((x - cx) * next) / scale, y - ((y - cy) * next) / scale, next]; });
  }

  /** @param {number} x @param {number} y @param {WheelEvent} event */
  wheel(x, y, event) {
    if (event.shiftKey) this.pan(-event.deltaY - event.deltaX, 0);
    else this.zoom(x, y, Math.exp(-event.deltaY * 0.0016));
  }

  /** @param {KeyboardEvent} event @returns {boolean} whether it was for here */
  key_(event) {
    const { app } = this;
    const selected = app.state.selection?.kind === "node" ? app.state.selection.id : -1;
    const middle = [this.board.width / 2, this.board.height / 2];
    if (event.key === "+" || event.key === "=") this.zoom(middle[0], middle[1], 1.25);
    else if (event.key === "-") this.zoom(middle[0], middle[1], 0.8);
    else if (event.key === "0") app.change((state) => { state.camera = null; });
    else if ((event.key === "Enter" || event.key === " ") && selected >= 0) this.toggle(selected);
    else if (event.key === "Backspace" && selected >= 0) {
      const parent = app.model.tree.parent[selected];
      if (app.state.open.has(selected)) this.toggle(selected);
      else if (parent >= 0) this.toggle(parent);
    } else if (event.key.startsWith("Arrow")) this.step(event.key.slice(5), selected);
    else return false;
    return true;
  }

  /** Select the nearest box in a direction. @param {string} direction @param {number} from */
  step(direction, from) {
    const boxes = this.layout?.boxes ?? [];
    const own = boxes[this.layout?.boxOf.get(from) ?? -1];
    const [dx, dy] = { Up: [0, -1], Down: [0, 1], Left: [-1, 0], Right: [1, 0] }[direction] ?? [0, 0];
    let best = own ? null : boxes.find((box) => !box.isOpen);
    let least = Infinity;
    for (const box of own ? boxes : []) {
      if (box === own || box.isOpen) continue;
      const x = box.x + box.width / 2 - (own.x + own.width / 2);
      const y = box.y + (dy && box.isOpen ? 0 : box.height / 2) - (own.y + own.height / 2);
      const along = x * dx + y * dy;
      if (along <= 4) continue;
      const cost = along + 2.5 * Math.abs(x * dy + y * dx);
      if (cost < least) [best, least] = [box, cost];
    }
    if (!best) return;
    this.app.select({ kind: "node", id: best.node });
    const spot = this.spot(best.node);
    const { width, height } = this.board;
    if (spot && (spot.x < 0 || spot.y < 0 || spot.x + best.width * spot.scale > width || spot.y + best.height * spot.scale > height)) {
      this.centre(best.node);
      this.app.render();
    }
  }
}

/**
 * @param {import("./layout.js").Box} box
 * @param {{ left: number, top: number, right: number, bottom: number }} sight
 */
function isSeen(box, sight) {
  return box.x < sight.right && box.x + box.width > sight.left && box.y < sight.bottom && box.y + box.height > sight.top;
}
