/** Holds the page together: what is shown, what is selected, and the link to it. */

import { FONT } from "./board.js";
import { makeButton, makeCheckbox, makeChoice, makeChoosable, makePanel, makeRow } from "./controls.js";
import { Detail } from "./detail.js";
import { VIEWS, makeFilters, makeViews } from "./frame.js";
import { countRuns, eachRun } from "./model.js";
import { PALETTES } from "./palette.js";
import { MOST_HELD } from "./slices.js";
import { Filter, freshState, readLink, writeLink } from "./state.js";
import { toRuns, writeCount, writeRanks, writeRuns } from "./text.js";

const METRICS = /** @type {[string, string][]} */ ([["time", "time"], ["waiting", "waiting"], ["bytes", "bytes sent"], ["imbalance", "imbalance"], ["path", "critical path"], ["nodes", "number of nodes"]]);

export class App {
  /** @param {import("./model.js").Model} model */
  constructor(model) {
    this.model = model;
    this.state = location.hash.length > 1 ? readLink(location.hash) : freshState();
    this.filter = new Filter(this.state.filters);
    this.marks = model.marks(this.state.selection);
    /** @type {Uint8Array | null} leaves that pass the filter; null: to be found out */
    this.passing = null;
    this.whyNoSlices = "";
    /** @type {import("./remote.js").Remote | import("./repeated.js").Repeated | null} slices that are there when wanted */
    this.remote = null;
    /** @type {any} */
    this.pairs = null;
    /** @type {import("./slices.js").Slices | null} those that the selection counts in */
    this.held = null;
    /** @type {{ refresh: () => void }[]} */
    this.controls = [];
    /** @type {{ [name: string]: any }} */
    this.views = {};
    /** @type {{ [name: string]: HTMLElement }} */
    this.places = {};
    this.pending = 0;
    this.darkness = matchMedia("(prefers-color-scheme: dark)");
    this.darkness.addEventListener("change", () => this.render());
    this.derive();
    makeViews(this);
    this.detail = new Detail(/** @type {HTMLElement} */ (document.getElementById("detail")), this);
    makeFilters(this);
    this.link = "";
    this.known = location.hash; // as it was last read or written
    addEventListener("hashchange", () => {
      this.known = location.hash;
      if (location.hash.slice(1) === this.link) return;
      this.state = readLink(location.hash);
      this.render();
    });
  }

  get isDark() {
    return this.state.theme ? this.state.theme === "dark" : this.darkness.matches;
  }

  get colours() {
    return this.isDark ? PALETTES.dark : PALETTES.light;
  }

  /** What follows from the state. */
  derive() {
    this.keepSlice();
    this.filter = new Filter(this.state.filters);
    this.marks = this.model.marks(this.state.selection);
    this.passing = null;
    if (!METRICS.some(([name]) => name === this.state.metric)) this.state.metric = this.model.hasTimes ? "time" : "bytes";
    if (!VIEWS.some((view) => view.name === this.state.view)) this.state.view = "overview";
  }

  /**
   * Change the state and draw.
   * @param {(state: import("./state.js").State) => void} how
   * @param {{ now: boolean }} [when] whether to draw soon; who says no draws itself
   */
  change(how, when = { now: true }) {
    how(this.state);
    this.derive();
    if (when.now) this.render();
  }

  /** @param {import("./state.js").Selection | null} selection */
  select(selection) {
    this.change((state) => { state.selection = selection; });
  }

  /** Draw with the next frame. */
  render() {
    if (!this.pending) this.pending = requestAnimationFrame(() => this.renderNow());
  }

  renderNow() {
    cancelAnimationFrame(this.pending);
    this.pending = 0;
    this.derive();
    document.documentElement.dataset.theme = this.isDark ? "dark" : "light";
    this.showView();
    for (const control of this.controls) control.refresh();
    const view = this.views[this.state.view];
    if (view.board) view.board.draw();
    else view.draw();
    if (view.board && view.draw && !view.board.width) view.draw();
    this.detail?.refresh();
    this.link = writeLink(this.state);
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.saveLink(), 80);
  }

  /** Write the link into the address bar, unless somebody has just followed another one there. */
  saveLink() {
    if (location.hash !== this.known) return;
    history.replaceState(null, "", `#${this.link}`);
    this.known = location.hash;
  }

  showView() {
    for (const view of VIEWS) {
      const isShown = view.name === this.state.view;
      this.places[view.name].hidden = !isShown;
      document.getElementById(`tab-${view.name}`)?.setAttribute("aria-selected", String(isShown));
    }
  }

  /** Views that have something to show of a selection. @param {import("./state.js").Selection} selection @param {string} from the view that it is shown in */
  viewsFor(selection, from) {
    const marks = this.model.marks(selection);
    return VIEWS.filter((view) => view.name !== from && (
      (view.name === "overview" && (marks.ranks.size || marks.leaves.length)) || (view.name === "graph" && marks.leaves.length) ||
      (view.name === "time" && (marks.ranks.size || marks.window)) || (view.name === "traffic" && marks.ranks.size && selection.kind !== "node")));
  }

  /**
   * Select something and bring it into sight in a view.
   * @param {import("./state.js").Selection} selection
   * @param {string} name
   */
  goTo(selection, name) {
    this.change((state) => { state.selection = selection; state.view = name; }, { now: false });
    if (name === "graph" && this.marks.leaves.length) {
      const [low, high] = this.marks.leaves[0];
      const node = selection.kind === "node" ? selection.id : this.holder(this.marks.leaves.length > 1 || high - low > 1);
      const kept = selection;
      this.views.graph.reveal(node);
      if (kept.kind !== "node") this.select(kept);
      return;
    }
    if (name === "time" && this.marks.window) {
      const [from, to] = this.marks.window;
      const pad = Math.max((to - from) * 1.2, 2e5);
      const some = this.fewRanks(selection);
      this.change((state) => {
        if (some) state.filters.rank = some;
        state.lanes = this.views.time.canHaveLanes();
        state.window = this.views.time.clip(from - pad, to + pad);
        state.top = 0;
      }, { now: false });
      this.renderNow();
      this.views.time.bring();
    }
    this.renderNow();
  }

  /**
   * Ranks to show where the slices of all of them cannot be held: those of the selection, or of its group.
   * @param {import("./state.js").Selection} selection
   */
  fewRanks(selection) {
    const { meta, stragglers, groups } = this.model;
    const canRead = this.remote && (!meta.slices_file || location.protocol.startsWith("http"));
    if (!canRead || meta.num_slices <= MOST_HELD || this.filter.ranks) return "";
    const ranks = new Set(this.marks.ranks);
    const group = selection.kind === "straggler" ? groups.group.indexOf(stragglers.group[selection.id]) : -1;
    if (group >= 0) eachRun(this.model.runs(groups.ranks, group), (rank) => ranks.add(rank));
    return writeRuns(toRuns(ranks), Infinity);
  }

  /** Slices of other ranks may be held now: the selected one has another place among them then, or none. */
  keepSlice() {
    const before = this.held;
    const { slices } = this.model;
    this.held = slices;
    const { selection } = this.state;
    if (!before || before === slices || selection?.kind !== "slice") return;
    const [node, rank] = [before.node[selection.id], before.rank[selection.id]];
    const at = slices?.ofNode(node).find((one) => slices.rank[one] === rank);
    this.state.selection = at === undefined ? null : { kind: "slice", id: at };
  }

  /** The node to open for the marked leaves: what all of them are in, else the first of them. @param {boolean} several */
  holder(several) {
    const { tree } = this.model;
    const last = this.marks.leaves.reduce((most, [, high]) => Math.max(most, high), 0);
    const first = this.marks.leaves.reduce((least, [low]) => Math.min(least, low), Infinity);
    const own = this.model.nodeOfLeaf(first);
    if (!several) return own;
    let node = own;
    while (node >= 0 && (tree.high[node] < last || tree.low[node] > first)) node = tree.parent[node];
    return node < 0 ? own : node;
  }

  /** Groups of a rank with others in them, each set of ranks once. @param {number} rank */
  groupsOf(rank) {
    const { model } = this;
    const found = [];
    const seen = new Set();
    for (let group = 0; group < model.groups.length; group++) {
      const runs = model.runs(model.groups.ranks, group);
      const axis = model.word(model.groups.axis, group);
      const key = `${axis} ${model.groups.ranks[group]}`;
      if (!axis || seen.has(key) || countRuns(runs) < 2 || countRuns(runs) === model.ranks.length) continue;
      let isIn = false;
      eachRun(runs, (one) => { isIn = isIn || one === rank; });
      if (!isIn) continue;
      seen.add(key);
      found.push({ id: group, axis });
    }
    return found;
  }

  /** Which leaves pass, parameters and the like as well; made once for a state. */
  leavesPassing() {
    this.passing ??= this.model.passing(this.filter, true);
    return this.passing;
  }

  /** What to say where a filter of something else than ranks is on, and cannot be applied. */
  onlyRanks() {
    const { layers, phase, microbatches } = this.filter;
    return layers || phase || microbatches ? "only ranks are filtered here" : "";
  }

  /** @param {number} slice */
  passesSlice(slice) {
    const { slices } = this.model;
    if (!this.filter.isOn || !slices) return true;
    const { microbatches } = this.filter;
    return Boolean(this.leavesPassing()[slices.leaf[slice]]) && (!microbatches || microbatches.has(slices.microbatch[slice]));
  }

  /** @param {number} cell */
  passesCell(cell) {
    const { cells } = this.model;
    const { layers } = this.filter;
    return (!layers || layers.has(cells.layer[cell])) && this.filter.passesPhase(this.model.word(cells.phase, cell));
  }

  /** Leaves that run, in the order of the walk. */
  orderedLeaves() {
    const passing = this.leavesPassing();
    const found = [];
    for (let leaf = 0; leaf < this.model.numLeaves; leaf++) if (!this.model.isEnd[leaf] && passing[leaf]) found.push(leaf);
    return found;
  }

  /** @param {number} x @param {import("./heat.js").Sight} sight @returns {number} -1: none */
  leafAtOrder(x, sight) {
    const leaves = this.orderedLeaves();
    return leaves[Math.floor(((x - sight.left) / sight.width) * leaves.length)] ?? -1;
  }

  /** Where a leaf is, in short. @param {number} leaf */
  shortPlace(leaf) {
    return this.model.path(this.model.leaves.node[leaf]).slice(0, -1).slice(0, 3).join(" / ");
  }

  /** @param {import("./board.js").Board} board @param {string} text */
  sayOn(board, text) {
    board.context.fillStyle = this.colours.quiet;
    board.context.font = `14px ${FONT}`;
    board.context.textAlign = "center";
    board.context.fillText(text, board.width / 2, board.height / 2);
    board.context.textAlign = "left";
  }

  /** @param {HTMLElement} place @param {(HTMLElement | { element: HTMLElement, refresh: () => void })[]} controls */
  tools(place, controls) {
    const bar = document.createElement("div");
    bar.className = "tools";
    for (const control of controls) {
      if (control instanceof HTMLElement) bar.append(control);
      else {
        bar.append(control.element);
        this.controls.push(control);
      }
    }
    place.append(bar);
    return bar;
  }

  /** @param {HTMLElement} bar */
  note(bar) {
    const note = Object.assign(document.createElement("span"), { className: "note" });
    bar.append(note);
    return note;
  }

  metricChoice() {
    const { model } = this;
    const unknown = METRICS.map(([name]) => name).filter((name) => (name === "path" ? !model.pieces : !model.hasTimes && !["bytes", "nodes"].includes(name)));
    return makeChoice("Colour", METRICS, () => this.state.metric, (value) => this.change((state) => { state.metric = value; }), new Set(unknown));
  }

  axisChoice() {
    const axes = ["tp", "ep", "etp", "pp", "dp", "edp", "cp"].filter((axis) => Math.max(...this.model.ranks[axis]) > 0);
    const options = /** @type {[string, string][]} */ ([["", "that amount"], ...axes.map((axis) => [axis, `place on ${axis}`])]);
    return makeChoice("Map shows", options, () => this.state.place, (value) => this.change((state) => { state.place = value; }));
  }

  /** @param {string} text @param {() => boolean} read @param {(on: boolean) => void} write */
  checkbox(text, read, write) {
    return makeCheckbox(text, read, write);
  }

  /** @param {string} text @param {[string, string][]} options @param {() => string} read @param {(value: string) => void} write */
  choice(text, options, read, write) {
    return makeChoice(text, options, read, write);
  }

  /** @param {string} text @param {string} key @param {() => void} act */
  button(text, key, act) {
    return makeButton(text, key, act);
  }

  /** @param {HTMLElement} place @param {string} title @param {string} kind */
  panel(place, title, kind) {
    return makePanel(place, title, kind);
  }

  /** @param {string[]} texts @param {"th" | "td"} kind @param {number} [words] which cell may be broken into lines */
  row(texts, kind, words) {
    return makeRow(texts, kind, words);
  }

  /** @param {HTMLElement} row @param {() => void} choose @param {() => void} [open] */
  makeChoice(row, choose, open) {
    makeChoosable(row, choose, open);
  }

  /** @param {string} kind */
  swatch(kind) {
    return Object.assign(document.createElement("i"), { className: `swatch ${kind}` });
  }

  /** @param {string} text */
  empty(text) {
    return Object.assign(document.createElement("p"), { className: "empty", textContent: text });
  }

  /** What is known of the whole, in a line. */
  summary() {
    const { meta } = this.model;
    const nodes = /** @type {number[]} */ (Object.values(meta.nodes)).reduce((sum, count) => sum + count, 0);
    const edges = /** @type {number[]} */ (Object.values(meta.edges)).reduce((sum, count) => sum + count, 0);
    const times = !this.model.hasTimes ? "no time was measured" : meta.is_estimated ? "times are estimates" : "";
    return [writeRanks(this.model.ranks.length), `${writeCount(nodes)} nodes`, `${writeCount(edges)} edges`, times, meta.strategy ?? "no strategy told"].filter(Boolean).join(" · ");
  }
}
