/** The data behind the views: the tree with its leaves, ranks, groups, slices, and what a selection is about. */

import { Filter } from "./state.js";

/** @typedef {import("./payload.js").Payload} Payload */
/**
 * What a selection marks in every view.
 * @typedef {{ ranks: Set<number>, leaves: [number, number][], nodes: Set<number>, window: [number, number] | null }} Marks
 */

/** Kinds of leaves that nothing runs in. */
const ENDS = new Set(["parameter", "input", "output"]);
const COMMUNICATIONS = new Set(["collective", "send", "recv"]);

export class Model {
  /** @param {Payload} payload */
  constructor(payload) {
    const { tables, documents } = payload;
    this.meta = documents.meta;
    this.findings = documents.findings;
    this.steps = documents.steps;
    this.whyNoAudit = documents.why_no_audit;
    this.tree = tables.tree;
    this.leaves = tables.leaves;
    this.edges = tables.edges;
    this.ranks = tables.ranks;
    this.groups = tables.groups;
    this.cells = tables.cells;
    this.messages = tables.messages;
    this.collectives = tables.collectives;
    this.heat = tables.heat ?? null;
    this.pieces = tables.pieces ?? null;
    this.stragglers = tables.stragglers ?? null;
    /** @type {import("./slices.js").Slices | null} */
    this.slices = null;
    this.numLeaves = this.leaves?.length ?? 0;
    this.numNodes = this.tree?.length ?? 0;
    /** @type {number[][]} children of each node; the last is the top's */
    this.children = Array.from({ length: this.numNodes + 1 }, () => []);
    for (let node = 0; node < this.numNodes; node++) {
      const parent = this.tree.parent[node];
      this.children[parent < 0 ? this.numNodes : parent].push(node);
    }
    /** @type {Map<number, number>} */
    this.rowOfRank = new Map();
    for (let row = 0; row < this.ranks.length; row++) this.rowOfRank.set(this.ranks.rank[row], row);
    this.isLeaf = new Uint8Array(this.numNodes);
    for (let leaf = 0; leaf < this.numLeaves; leaf++) this.isLeaf[this.leaves.node[leaf]] = 1;
    this.isEnd = new Uint8Array(this.numLeaves);
    this.isCommunication = new Uint8Array(this.numLeaves);
    for (let leaf = 0; leaf < this.numLeaves; leaf++) {
      const kind = this.word(this.leaves.kind, leaf);
      this.isEnd[leaf] = ENDS.has(kind) ? 1 : 0;
      this.isCommunication[leaf] = COMMUNICATIONS.has(kind) ? 1 : 0;
    }
    const routing = this.leaves.category.names.indexOf("routing");
    this.isRouting = Uint8Array.from(this.leaves.category, (/** @type {number} */ code) => Number(code === routing));
    const message = this.edges.kind.names.indexOf("p2p");
    this.isMessage = Uint8Array.from(this.edges.kind, (/** @type {number} */ code) => Number(code === message));
    /** @type {Map<number, string>} */
    this._titles = new Map();
    this.hasTimes = this.meta.window_ns !== null;
    this._sumPath();
    this.edgeBegins = this._indexEdges();
  }

  /**
   * A string of a column of codes.
   * @param {any} column
   * @param {number} row
   * @returns {string}
   */
  word(column, row) {
    return column.names[column[row]];
  }

  /**
   * @param {any} column
   * @param {number} row
   * @returns {number[]} first and count, in turn
   */
  runs(column, row) {
    return column.runs[column[row]];
  }

  /**
   * A node's name; of several parts of one name, with its number.
   * @param {number} node
   */
  title(node) {
    const known = this._titles.get(node);
    if (known !== undefined) return known;
    const parent = this.tree.parent[node];
    /** @type {Map<string, number[]>} */
    const named = new Map();
    for (const child of this.children[parent < 0 ? this.numNodes : parent]) {
      const name = this.word(this.tree.name, child);
      if (this.isLeaf[child]) this._titles.set(child, name);
      else named.set(name, [...(named.get(name) ?? []), child]);
    }
    for (const [name, same] of named) {
      same.forEach((child, at) => this._titles.set(child, same.length > 1 ? `${name} (${at + 1}/${same.length})` : name));
    }
    return this._titles.get(node) ?? "";
  }

  /** @param {number} node */
  path(node) {
    const names = [];
    for (let at = node; at >= 0; at = this.tree.parent[at]) names.unshift(this.word(this.tree.name, at));
    return names;
  }

  /** @param {number} node */
  categoryOf(node) {
    const leaf = this.tree.low[node];
    if (this.isEnd[leaf]) return "ends";
    if (this.isCommunication[leaf]) return "transfer";
    return this.word(this.leaves.category, leaf) === "routing" ? "routing" : "compute";
  }

  /**
   * A node's amount by metric; NaN is unknown.
   * @param {number} node
   * @param {string} metric
   * @returns {{ value: number, isEstimated: boolean }}
   */
  amount(node, metric) {
    const { tree } = this;
    if (metric === "waiting") {
      const isSure = tree.wait_mean_ns[node] >= 0;
      const value = isSure ? tree.wait_mean_ns[node] : tree.estimated_wait_mean_ns[node];
      return { value, isEstimated: !isSure && value >= 0 };
    }
    if (metric === "bytes") return { value: tree.sent_bytes[node], isEstimated: false };
    if (metric === "nodes") return { value: tree.num_nodes[node], isEstimated: false };
    if (metric === "path") return { value: this.pathBefore ? this.pathBefore[tree.high[node]] - this.pathBefore[tree.low[node]] : NaN, isEstimated: this.meta.is_estimated };
    const isMeasured = tree.mean_ns[node] >= 0;
    const mean = isMeasured ? tree.mean_ns[node] : tree.estimated_mean_ns[node];
    const most = isMeasured ? tree.max_ns[node] : tree.estimated_max_ns[node];
    if (metric === "imbalance") return { value: mean > 0 ? most / mean - 1 : NaN, isEstimated: !isMeasured };
    return { value: mean, isEstimated: !isMeasured && mean >= 0 };
  }

  /**
   * Which leaves pass a filter.
   * @param {Filter} filter
   * @param {boolean} withEnds
   */
  passing(filter, withEnds) {
    const passing = new Uint8Array(this.numLeaves);
    const rankOk = matchRuns(this.tree.ranks.runs, filter.ranks);
    const batchOk = matchRuns(this.tree.microbatches.runs, filter.microbatches);
    for (let leaf = 0; leaf < this.numLeaves; leaf++) {
      const node = this.leaves.node[leaf];
      passing[leaf] = Number(
        (withEnds || !this.isEnd[leaf]) &&
        rankOk[this.tree.ranks[node]] && batchOk[this.tree.microbatches[node]] &&
        (!filter.layers || filter.layers.has(this.leaves.layer[leaf])) &&
        filter.passesPhase(this.word(this.leaves.phase, leaf)));
    }
    return passing;
  }

  /** Stage, layer or part of the model, and phase, of a leaf or a cell. @param {any} table @param {number} row */
  placeOf(table, row) {
    return `${table.stage[row]} ${table.layer[row]} ${this.word(table.phase, row)} ${this.word(table.part, row)}`;
  }

  /** The node that is a leaf. @param {number} leaf */
  nodeOfLeaf(leaf) {
    return this.leaves.node[leaf];
  }

  /**
   * @param {import("./state.js").Selection | null} selection
   * @returns {Marks}
   */
  marks(selection) {
    /** @type {Marks} */
    const marks = { ranks: new Set(), leaves: [], nodes: new Set(), window: null };
    if (!selection) return marks;
    const { kind, id } = selection;
    const one = (/** @type {number} */ leaf) => { if (leaf >= 0) marks.leaves.push([leaf, leaf + 1]); };
    if (kind === "node" && id < this.numNodes) {
      marks.leaves.push([this.tree.low[id], this.tree.high[id]]);
      eachRun(this.runs(this.tree.ranks, id), (rank) => marks.ranks.add(rank));
    } else if (kind === "rank") {
      marks.ranks.add(id);
    } else if (kind === "group" && id < this.groups.length) {
      eachRun(this.runs(this.groups.ranks, id), (rank) => marks.ranks.add(rank));
    } else if (kind === "slice" && this.slices && id < this.slices.length) {
      const found = this.slices;
      one(found.leaf[id]);
      marks.nodes.add(found.node[id]);
      for (const other of found.partners(id)) marks.ranks.add(found.rank[other]);
      const begin = (found.start[id] - found.wait[id]) * found.tick;
      marks.window = [begin, (found.start[id] + found.span[id]) * found.tick];
    } else if (kind === "piece" && this.pieces && id < this.pieces.length) {
      one(this.pieces.leaf[id]);
      marks.ranks.add(this.pieces.rank[id]);
      marks.nodes.add(this.pieces.node[id]);
      marks.window = [this.pieces.start_ns[id], this.pieces.end_ns[id]];
    } else if (kind === "straggler" && this.stragglers && id < this.stragglers.length) {
      one(this.stragglers.leaf[id]);
      marks.ranks.add(this.stragglers.rank[id]);
      marks.nodes.add(this.stragglers.node[id]);
      if (this.stragglers.held_node[id] >= 0) marks.nodes.add(this.stragglers.held_node[id]);
      if (this.stragglers.end_ns[id] >= 0) marks.window = [this.stragglers.start_ns[id], this.stragglers.end_ns[id]];
    } else if (kind === "finding" && id < this.findings.length) {
      const finding = this.findings[id];
      for (const rank of finding.ranks) marks.ranks.add(rank);
      for (const leaf of finding.leaves) one(leaf);
      for (const node of finding.nodes) marks.nodes.add(node);
      marks.window = this._windowOf(finding.nodes[0] ?? -1);
      if (!finding.leaves.length && finding.layers.length) {
        const layers = new Set(finding.layers);
        for (let leaf = 0; leaf < this.numLeaves; leaf++) if (layers.has(this.leaves.layer[leaf])) one(leaf);
      }
    } else if (kind === "cell" && id < this.cells.length) {
      const place = this.placeOf(this.cells, id);
      for (let leaf = 0; leaf < this.numLeaves; leaf++) if (!this.isEnd[leaf] && this.placeOf(this.leaves, leaf) === place) one(leaf);
    }
    return marks;
  }

  /** When a node of the graph ran, over all its ranks, if that is known here. @param {number} node @returns {[number, number] | null} */
  _windowOf(node) {
    const { slices } = this;
    const found = slices?.ofNode(node) ?? [];
    if (!slices || !found.length) return null;
    const begins = found.map((at) => (slices.start[at] - slices.wait[at]) * slices.tick);
    return [Math.min(...begins), Math.max(...found.map((at) => (slices.start[at] + slices.span[at]) * slices.tick))];
  }

  /** How much of the critical paths lies on leaves before each, on each rank, and in each cell of stages and layers. */
  _sumPath() {
    /** @type {Float64Array | null} */
    this.pathBefore = null;
    this.pathOfRank = new Float64Array(this.ranks.length);
    this.pathOfCell = new Float64Array(this.cells?.length ?? 0);
    if (!this.pieces) return;
    this.pathBefore = new Float64Array(this.numLeaves + 1);
    for (let at = 0; at < this.pieces.length; at++) {
      const span = this.pieces.end_ns[at] - this.pieces.start_ns[at];
      this.pathBefore[this.pieces.leaf[at] + 1] += span;
      this.pathOfRank[this.rowOfRank.get(this.pieces.rank[at]) ?? 0] += span;
    }
    const cellOf = new Map(Array.from(this.pathOfCell, (_, cell) => [this.placeOf(this.cells, cell), cell]));
    for (let leaf = 0; leaf < this.numLeaves; leaf++) {
      const cell = this.pathBefore[leaf + 1] ? cellOf.get(this.placeOf(this.leaves, leaf)) : undefined;
      if (cell !== undefined) this.pathOfCell[cell] += this.pathBefore[leaf + 1];
      this.pathBefore[leaf + 1] += this.pathBefore[leaf];
    }
  }

  /** Where the edges of each leaf begin; they are sorted by src. */
  _indexEdges() {
    const begins = new Uint32Array(this.numLeaves + 1);
    for (let edge = 0; edge < this.edges.length; edge++) begins[this.edges.src[edge] + 1]++;
    for (let leaf = 0; leaf < this.numLeaves; leaf++) begins[leaf + 1] += begins[leaf];
    return begins;
  }
}

/**
 * @param {ArrayLike<number>} runs
 * @param {(number: number) => void} take
 */
export function eachRun(runs, take) {
  for (let i = 0; i < runs.length; i += 2) for (let k = 0; k < runs[i + 1]; k++) take(runs[i] + k);
}

/** @param {ArrayLike<number>} runs */
export function countRuns(runs) {
  let count = 0;
  for (let i = 1; i < runs.length; i += 2) count += runs[i];
  return count;
}

/**
 * @param {number[][]} lists
 * @param {Set<number> | null} wanted
 */
function matchRuns(lists, wanted) {
  return lists.map((runs) => {
    if (!wanted) return true;
    let hit = false;
    eachRun(runs, (number) => { hit = hit || wanted.has(number); });
    return hit;
  });
}
