/** Slices of ranks that do what another does at the same times: made for the ranks on screen when they are to be drawn. */

import { MOST_HELD, Slices } from "./slices.js";
import { writeCount } from "./text.js";

/** @typedef {import("./payload.js").Table} Table */

export class Repeated {
  /**
   * @param {import("./model.js").Model} model
   * @param {{ slices: Table, turns: Table, moved: Table, pairs: Table }} tables as slices.py tells them: of one rank of
   *   each class, what is added to a node's number by team and rank, and the leaves of ranks with other experts
   */
  constructor(model, tables) {
    this.model = model;
    this.tables = tables;
    /** @type {import("./app.js").App | null} */
    this.app = null;
    this.key = "";
    /** @type {Map<number, [number, number]>} by rank: where its slices begin and end */
    this.own = spans(tables.slices.rank);
    /** @type {Map<number, [number, number]>} by rank: where its leaves begin and end among the moved ones */
    this.other = spans(tables.moved.alike);
  }

  /**
   * Make what the ranks on screen did, if that is to be shown and is not here yet.
   * @param {number[]} ranks
   */
  want(ranks) {
    const { app } = this;
    if (!app?.state.lanes) return;
    const key = ranks.join();
    if (key === this.key) return;
    this.key = key;
    const count = this.count(ranks);
    this.model.slices = count > MOST_HELD ? null : this.make(ranks);
    app.whyNoSlices = `${writeCount(count)} slices are too many to draw: filter by rank, 0-31 say`;
    app.passing = null;
    app.render(); // what stands beside this view says more of slices that are here
  }

  /** How many slices some ranks have. @param {number[]} ranks */
  count(ranks) {
    return ranks.reduce((sum, rank) => { const [begin, end] = this.spanOf(rank); return sum + end - begin; }, 0);
  }

  /** @param {number} rank @returns {[number, number]} */
  spanOf(rank) {
    const { ranks, rowOfRank } = this.model;
    return this.own.get(ranks.like[/** @type {number} */ (rowOfRank.get(rank))]) ?? [0, 0];
  }

  /** @param {number[]} wanted ranks, rising @returns {Slices} */
  make(wanted) {
    const { slices, turns, moved, pairs } = this.tables;
    const { ranks, rowOfRank, meta } = this.model;
    const total = this.count(wanted);
    /** @type {{ [name: string]: any }} */
    const table = { node: new Uint32Array(total), rank: new Uint32Array(total), leaf: new Uint32Array(total) };
    const same = ["lane", "microbatch", "start", "span", "wait", "is_estimated"];
    for (const name of same) table[name] = new Float64Array(total);
    let at = 0;
    for (const rank of wanted) {
      const row = /** @type {number} */ (rowOfRank.get(rank));
      const [begin, end] = this.spanOf(rank);
      for (const name of same) table[name].set(slices[name].subarray(begin, end), at);
      table.leaf.set(slices.leaf.subarray(begin, end), at);
      table.rank.fill(rank, at, at + end - begin);
      for (let slice = begin; slice < end; slice++) {
        table.node[at + slice - begin] = slices.node[slice] + turns.turn[slices.team[slice] * ranks.length + row];
      }
      const [low, high] = this.other.get(ranks.alike[row]) ?? [0, 0];
      for (let place = low; place < high; place++) table.leaf[at + moved.place[place]] = moved.leaf[place];
      at += end - begin;
    }
    return new Slices(table, meta.tick_ns, pairs);
  }
}

/** Where the stretches of equal values are. @param {ArrayLike<number>} values @returns {Map<number, [number, number]>} */
function spans(values) {
  /** @type {Map<number, [number, number]>} */
  const found = new Map();
  for (let at = 0; at < values.length; at++) {
    const last = found.get(values[at]);
    if (last) last[1] = at + 1;
    else found.set(values[at], [at, at + 1]);
  }
  return found;
}
