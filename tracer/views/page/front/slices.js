/** Every timed operator and every rank's part in a communication: by lane, by node, and in sum by rank. */

/** @typedef {{ rank: number, lane: number, begin: number, end: number }} Lane a stretch of the slices */

export const COMMUNICATION_LANE = 2000;
export const MOST_HELD = 3_000_000; // slices held at a time
const STREAM_LANE = 1000;

export class Slices {
  /**
   * @param {any} table rank, lane, node, leaf, microbatch, start, length as span, wait, is_estimated; by rank and lane
   * @param {number} tick ns
   * @param {any} pairs source and destination: nodes of messages
   */
  constructor(table, tick, pairs) {
    this.length = table.rank.length;
    this.rank = table.rank;
    this.lane = table.lane;
    this.node = table.node;
    this.leaf = table.leaf;
    this.microbatch = table.microbatch;
    this.start = table.start;
    this.span = table.span;
    this.wait = table.wait;
    this.isEstimated = table.is_estimated;
    this.tick = tick;
    this.pairs = pairs;
    /** @type {Lane[]} */
    this.lanes = [];
    this.reach = new Float64Array(this.length); // the latest end up to here, in its lane
    for (let at = 0; at < this.length; at++) {
      const last = this.lanes[this.lanes.length - 1];
      if (last && last.rank === this.rank[at] && last.lane === this.lane[at]) last.end = at + 1;
      else this.lanes.push({ rank: this.rank[at], lane: this.lane[at], begin: at, end: at + 1 });
      const before = this.lanes[this.lanes.length - 1].begin < at ? this.reach[at - 1] : 0;
      this.reach[at] = Math.max(before, this.start[at] + this.span[at]);
    }
    /** @type {Uint32Array | null} */
    this._byNode = null;
    /** @type {Map<number, number> | null} */
    this._other = null;
  }

  /**
   * The slices of a node of the graph: one on each rank that took part.
   * @param {number} node
   * @returns {number[]}
   */
  ofNode(node) {
    if (!this._byNode) {
      this._byNode = Uint32Array.from({ length: this.length }, (_, at) => at);
      this._byNode.sort((one, other) => this.node[one] - this.node[other]);
    }
    let low = 0;
    let high = this.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.node[this._byNode[middle]] < node) low = middle + 1;
      else high = middle;
    }
    const found = [];
    while (low < this.length && this.node[this._byNode[low]] === node) found.push(this._byNode[low++]);
    return found;
  }

  /**
   * All parts of the communication that a slice is in; itself alone if it is none.
   * @param {number} at
   * @returns {number[]}
   */
  partners(at) {
    if (!this._other) {
      this._other = new Map();
      for (let pair = 0; pair < (this.pairs?.length ?? 0); pair++) {
        this._other.set(this.pairs.source[pair], this.pairs.destination[pair]);
        this._other.set(this.pairs.destination[pair], this.pairs.source[pair]);
      }
    }
    const other = this._other.get(this.node[at]);
    return [...this.ofNode(this.node[at]), ...(other === undefined ? [] : this.ofNode(other))];
  }

  /**
   * The first slice of a lane that ends at or after a time.
   * @param {Lane} lane
   * @param {number} ns
   */
  firstAfter(lane, ns) {
    const tick = ns / this.tick;
    let low = lane.begin;
    let high = lane.end;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.reach[middle] < tick) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /**
   * What each rank spent in some leaves.
   * @param {number} low
   * @param {number} high excluded
   * @returns {Map<number, { calls: number, time: number, wait: number, isEstimated: boolean }>}
   */
  totals(low, high) {
    const totals = new Map();
    for (let at = 0; at < this.length; at++) {
      if (this.leaf[at] < low || this.leaf[at] >= high) continue;
      const rank = this.rank[at];
      let sum = totals.get(rank);
      if (!sum) totals.set(rank, (sum = { calls: 0, time: 0, wait: 0, isEstimated: false }));
      sum.calls++;
      sum.time += this.span[at] * this.tick;
      sum.wait += this.wait[at] * this.tick;
      sum.isEstimated ||= this.isEstimated[at] === 1;
    }
    return totals;
  }
}

/** @param {number} lane */
export function laneName(lane) {
  if (lane === COMMUNICATION_LANE) return "communication";
  return lane >= STREAM_LANE ? `stream ${lane - STREAM_LANE}` : `thread ${lane}`;
}
