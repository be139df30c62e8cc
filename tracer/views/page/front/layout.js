/**
 * Places of the graph's boxes. An open node is a frame around its own graph, laid out by itself: rows by longest path,
 * in a row those near to each other that are tied; at the top a column for each stage. A tall, narrow graph goes on in
 * a second column.
 */

/** @typedef {{ node: number, x: number, y: number, width: number, height: number, isOpen: boolean }} Box */
/** @typedef {{ from: number, to: number, edges: number, bytes: number, isMessage: boolean, isRouting: boolean }} Tie between boxes */
/** @typedef {{ boxes: Box[], ties: Tie[], width: number, height: number, boxOf: Map<number, number> }} Layout */

const CLOSED = { width: 222, height: 62 };
const LEAF = { width: 228, height: 60 };
const GAP_X = 22;
const GAP_Y = 34;
const PAD = 14;
const HEAD = 30;
const MOST_IN_ROW = 8;
const TALL = 1300;

/**
 * @param {import("./model.js").Model} model
 * @param {Set<number>} open
 * @param {Uint8Array} passing [leaves]
 * @returns {Layout}
 */
export function layOut(model, open, passing) {
  const counts = countPassing(model, passing);
  const top = arrange(model, -1, open, passing, counts);
  /** @type {Box[]} */
  const boxes = [];
  place(top, 0, 0, boxes);
  const boxOf = new Map(boxes.map((box, at) => [box.node, at]));
  return { boxes, ties: tie(model, boxes, passing), width: top.width, height: top.height, boxOf };
}

/** @typedef {{ node: number, width: number, height: number, inner: { part: Part, x: number, y: number }[] | null }} Part */

/**
 * @param {Part} part
 * @param {number} x
 * @param {number} y
 * @param {Box[]} boxes
 */
function place(part, x, y, boxes) {
  if (part.node >= 0) {
    boxes.push({ node: part.node, x, y, width: part.width, height: part.height, isOpen: part.inner !== null });
  }
  for (const inner of part.inner ?? []) place(inner.part, x + inner.x, y + inner.y, boxes);
}

/**
 * How many leaves of each node pass, as sums over the walk.
 * @param {import("./model.js").Model} model
 * @param {Uint8Array} passing
 */
function countPassing(model, passing) {
  const sums = new Uint32Array(model.numLeaves + 1);
  for (let leaf = 0; leaf < model.numLeaves; leaf++) sums[leaf + 1] = sums[leaf] + passing[leaf];
  return sums;
}

/**
 * @param {import("./model.js").Model} model
 * @param {number} node -1 is the top
 * @param {Set<number>} open
 * @param {Uint8Array} passing
 * @param {Uint32Array} counts
 * @returns {Part}
 */
function arrange(model, node, open, passing, counts) {
  const { tree } = model;
  if (node >= 0 && (model.isLeaf[node] || !open.has(node))) {
    return { node, ...(model.isLeaf[node] ? LEAF : CLOSED), inner: null };
  }
  const children = model.children[node < 0 ? model.numNodes : node]
    .filter((child) => counts[tree.high[child]] > counts[tree.low[child]]);
  const parts = children.map((child) => arrange(model, child, open, passing, counts));
  const low = node < 0 ? 0 : tree.low[node];
  const high = node < 0 ? model.numLeaves : tree.high[node];
  const links = linksAmong(model, children, low, high, passing);
  const rows = rank(children.length, links);
  const hasStages = node < 0 && new Set(children.map((child) => model.leaves.stage[tree.low[child]])).size > 1;
  const placed = hasStages ? inLanes(model, children, parts, rows) : inRows(parts, rows, links);
  const pad = node < 0 ? 0 : PAD;
  const head = node < 0 ? 0 : HEAD;
  return {
    node,
    width: Math.max(placed.width + 2 * pad, node < 0 ? 0 : CLOSED.width),
    height: placed.height + head + pad,
    inner: placed.at.map(([x, y], at) => ({ part: parts[at], x: x + pad, y: y + head })),
  };
}

/**
 * Which of a node's children lead to which: pairs of places.
 * @param {import("./model.js").Model} model
 * @param {number[]} children
 * @param {number} low
 * @param {number} high
 * @param {Uint8Array} passing
 * @returns {[number, number][]}
 */
function linksAmong(model, children, low, high, passing) {
  const owner = new Int32Array(high - low).fill(-1);
  children.forEach((child, at) => owner.fill(at, model.tree.low[child] - low, model.tree.high[child] - low));
  const seen = new Set();
  /** @type {[number, number][]} */
  const links = [];
  const { src, dst } = model.edges;
  for (let edge = model.edgeBegins[low]; edge < model.edgeBegins[high]; edge++) {
    const head = dst[edge];
    if (head < low || head >= high || !passing[src[edge]] || !passing[head]) continue;
    const from = owner[src[edge] - low];
    const to = owner[head - low];
    const key = from * children.length + to;
    if (from === to || from < 0 || to < 0 || seen.has(key)) continue;
    seen.add(key);
    links.push([from, to]);
  }
  return links;
}

/**
 * Rows by longest path; what nothing leads to stands right above what it leads to.
 * @param {number} count
 * @param {[number, number][]} links
 * @returns {number[]}
 */
function rank(count, links) {
  /** @type {number[][]} */
  const after = Array.from({ length: count }, () => []);
  const open = new Int32Array(count);
  for (const [from, to] of links) {
    after[from].push(to);
    open[to]++;
  }
  const isSource = Array.from(open, (number) => number === 0);
  const row = new Array(count).fill(0);
  const order = [];
  for (let at = 0; at < count; at++) if (!open[at]) order.push(at);
  for (let next = 0; next < order.length; next++) {
    for (const to of after[order[next]]) {
      row[to] = Math.max(row[to], row[order[next]] + 1);
      if (!--open[to]) order.push(to);
    }
  }
  for (let at = 0; at < count; at++) {
    if (isSource[at] && after[at].length) row[at] = Math.min(...after[at].map((to) => row[to])) - 1;
  }
  const lowest = Math.min(0, ...row);
  return row.map((value) => value - lowest);
}

/**
 * @param {Part[]} parts
 * @param {number[]} rows
 * @param {[number, number][]} links
 */
function inRows(parts, rows, links) {
  /** @type {number[][]} */
  const lines = [];
  rows.forEach((row, at) => (lines[row] ??= []).push(at));
  const filled = lines.filter(Boolean);
  sortLines(filled, parts.length, links);
  /** @type {number[][]} */
  const bands = [];
  for (const line of filled) {
    for (let begin = 0; begin < line.length; begin += MOST_IN_ROW) bands.push(line.slice(begin, begin + MOST_IN_ROW));
  }
  const sizes = bands.map((band) => ({
    width: band.reduce((sum, at) => sum + parts[at].width, 0) + GAP_X * (band.length - 1),
    height: Math.max(...band.map((at) => parts[at].height)),
  }));
  const total = sizes.reduce((sum, size) => sum + size.height + GAP_Y, 0);
  const widest = Math.max(0, ...sizes.map((size) => size.width));
  const numColumns = Math.max(1, Math.min(Math.ceil(total / TALL), Math.floor(2600 / Math.max(widest, 1))));
  const tall = total / numColumns;
  /** @type {[number, number][]} */
  const at = new Array(parts.length);
  let x = 0;
  let y = 0;
  let height = 0;
  let column = 0;
  bands.forEach((band, number) => {
    if (column < numColumns - 1 && y > 0 && y + sizes[number].height / 2 > tall) {
      column++;
      x += widest + 3 * GAP_X;
      y = 0;
    }
    let left = x + (widest - sizes[number].width) / 2;
    for (const part of band) {
      at[part] = [left, y];
      left += parts[part].width + GAP_X;
    }
    height = Math.max(height, y + sizes[number].height);
    y += sizes[number].height + GAP_Y;
  });
  return { at, width: x + widest, height };
}

/**
 * Order each line by where its neighbours stand: down and up again.
 * @param {number[][]} lines
 * @param {number} count
 * @param {[number, number][]} links
 */
function sortLines(lines, count, links) {
  /** @type {number[][]} */
  const near = Array.from({ length: count }, () => []);
  for (const [from, to] of links) {
    near[from].push(to);
    near[to].push(from);
  }
  const spot = new Float64Array(count);
  const settle = (/** @type {number[]} */ line) => line.forEach((at, place) => {
    spot[at] = line.length > 1 ? place / (line.length - 1) : 0.5;
  });
  lines.forEach(settle);
  for (let sweep = 0; sweep < 4; sweep++) {
    for (const line of sweep % 2 ? [...lines].reverse() : lines) {
      const wish = new Map(line.map((at) => [at, near[at].length
        ? near[at].reduce((sum, other) => sum + spot[other], 0) / near[at].length : spot[at]]));
      line.sort((one, other) => /** @type {number} */ (wish.get(one)) - /** @type {number} */ (wish.get(other)) || one - other);
      settle(line);
    }
  }
}

/**
 * The top: a column for each stage, rows by longest path.
 * @param {import("./model.js").Model} model
 * @param {number[]} children
 * @param {Part[]} parts
 * @param {number[]} rows
 */
function inLanes(model, children, parts, rows) {
  const stages = children.map((child) => model.leaves.stage[model.tree.low[child]]);
  const named = [...new Set(stages.filter((stage) => stage >= 0))].sort((one, other) => one - other);
  const laneOf = new Map(named.map((stage, lane) => [stage, lane]));
  const lanes = stages.map((stage) => laneOf.get(stage) ?? named.length);
  const widths = new Array(named.length + 1).fill(0);
  parts.forEach((part, at) => { widths[lanes[at]] = Math.max(widths[lanes[at]], part.width); });
  const lefts = widths.map((_, lane) => widths.slice(0, lane).reduce((sum, width) => sum + (width ? width + 2 * GAP_X : 0), 0));
  /** @type {[number, number][]} */
  const at = new Array(parts.length);
  let y = 0;
  const last = Math.max(-1, ...rows);
  for (let row = 0; row <= last; row++) {
    const fill = new Array(widths.length).fill(0);
    for (let child = 0; child < parts.length; child++) {
      if (rows[child] !== row) continue;
      const lane = lanes[child];
      at[child] = [lefts[lane] + (widths[lane] - parts[child].width) / 2, y + fill[lane]];
      fill[lane] += parts[child].height + GAP_Y / 2;
    }
    const height = Math.max(...fill);
    if (height) y += height - GAP_Y / 2 + GAP_Y;
  }
  const right = Math.max(0, ...lefts.map((left, lane) => left + widths[lane]));
  return { at, width: right, height: Math.max(0, y - GAP_Y) };
}

/**
 * What the boxes on screen hand to each other.
 * @param {import("./model.js").Model} model
 * @param {Box[]} boxes
 * @param {Uint8Array} passing
 * @returns {Tie[]}
 */
function tie(model, boxes, passing) {
  const owner = new Int32Array(model.numLeaves).fill(-1);
  boxes.forEach((box, at) => {
    if (!box.isOpen) owner.fill(at, model.tree.low[box.node], model.tree.high[box.node]);
  });
  /** @type {Map<number, Tie>} */
  const found = new Map();
  const { src, dst, num_edges: numEdges, bytes } = model.edges;
  for (let edge = 0; edge < model.edges.length; edge++) {
    const from = owner[src[edge]];
    const to = owner[dst[edge]];
    if (from < 0 || to < 0 || from === to || !passing[src[edge]] || !passing[dst[edge]]) continue;
    const key = from * boxes.length + to;
    let one = found.get(key);
    if (!one) found.set(key, (one = { from, to, edges: 0, bytes: 0, isMessage: false, isRouting: true }));
    one.edges += numEdges[edge];
    one.bytes += bytes[edge];
    one.isMessage ||= model.isMessage[edge] === 1;
    one.isRouting &&= model.isRouting[src[edge]] === 1;
  }
  return [...found.values()];
}
