/** Ranks over time: colour says what each was at. Without times, ranks over the folded graph's order. */

import { FONT } from "./board.js";
import { amountChannels } from "./palette.js";
import { eachRun } from "./model.js";

const SPENT = ["compute", "transfer", "waiting", "bubble"];

/** @typedef {{ left: number, top: number, width: number, height: number, from: number, to: number, ranks: number[] }} Sight */

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Sight} sight
 * @param {import("./app.js").App} app
 */
export function drawHeat(context, sight, app) {
  const { model, state, colours } = app;
  const bins = model.meta.num_bins;
  const first = Math.floor((sight.from / model.meta.window_ns[1]) * bins);
  const last = Math.min(bins, Math.ceil((sight.to / model.meta.window_ns[1]) * bins));
  const image = new ImageData(Math.max(1, last - first), Math.max(1, sight.ranks.length));
  const channels = Object.fromEntries([...SPENT, "host", "idle"].map((name) => [name, channelsOf(colours.kinds[name])]));
  sight.ranks.forEach((rank, line) => {
    const base = (model.rowOfRank.get(rank) ?? 0) * bins;
    for (let bin = first; bin < last; bin++) {
      const shares = SPENT.map((name) => model.heat[name][base + bin]);
      const at = 4 * (line * image.width + bin - first);
      let colour;
      if (state.heat === "mix") {
        const host = Math.max(0, 255 - shares.reduce((sum, share) => sum + share, 0));
        const most = Math.max(...shares, host);
        const name = SPENT[shares.indexOf(most)] ?? "host";
        // Paler where it was several things.
        colour = blend(channels.idle, channels[name], 0.35 + (0.65 * most) / 255);
      } else colour = amountChannels(model.heat[state.heat][base + bin] / 255);
      image.data.set([colour[0], colour[1], colour[2], 255], at);
    }
  });
  const tile = document.createElement("canvas");
  tile.width = image.width;
  tile.height = image.height;
  /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d")).putImageData(image, 0, 0);
  context.save();
  context.beginPath();
  context.rect(sight.left, sight.top, sight.width, sight.height);
  context.clip();
  context.imageSmoothingEnabled = false;
  const perNs = sight.width / (sight.to - sight.from);
  const begin = sight.left + ((first / bins) * model.meta.window_ns[1] - sight.from) * perNs;
  const span = ((last - first) / bins) * model.meta.window_ns[1] * perNs;
  context.drawImage(tile, begin, sight.top, span, sight.height);
  if (model.meta.is_estimated) hatch(context, sight, colours.paper);
  context.restore();
  drawRankNames(context, sight, app);
  drawWindow(context, sight, app);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Sight} sight
 * @param {import("./app.js").App} app
 */
export function drawRankNames(context, sight, app) {
  const { colours, marks, model } = app;
  const height = sight.height / Math.max(1, sight.ranks.length);
  const every = Math.max(1, Math.ceil(13 / height));
  context.font = `11px ${FONT}`;
  context.textBaseline = "middle";
  context.textAlign = "right";
  sight.ranks.forEach((rank, line) => {
    const y = sight.top + line * height;
    const isMarked = marks.ranks.has(rank);
    if (isMarked) {
      context.fillStyle = colours.accent;
      context.fillRect(sight.left - 5, y, 4, Math.max(1, height - (height > 4 ? 1 : 0)));
    }
    if (line % every) return;
    context.fillStyle = isMarked ? colours.ink : colours.quiet;
    const stage = model.ranks.pp[model.rowOfRank.get(rank) ?? 0];
    context.fillText(stage >= 0 ? `rank ${rank} · stage ${stage}` : `rank ${rank}`, sight.left - 9, y + height / 2);
    if (height > 12) {
      context.fillStyle = colours.paper;
      context.fillRect(sight.left, y + height - 1, sight.width, 1);
    }
  });
  context.textAlign = "left";
}

/**
 * The time that the selection is about.
 * @param {CanvasRenderingContext2D} context
 * @param {Sight} sight
 * @param {import("./app.js").App} app
 */
function drawWindow(context, sight, app) {
  const { window: span } = app.marks;
  if (!span) return;
  const perNs = sight.width / (sight.to - sight.from);
  const x0 = sight.left + (span[0] - sight.from) * perNs;
  const x1 = sight.left + (span[1] - sight.from) * perNs;
  context.strokeStyle = app.colours.accent;
  context.lineWidth = 1.5;
  context.strokeRect(Math.max(x0, sight.left) - 1, sight.top, Math.max(3, Math.min(x1, sight.left + sight.width) - Math.max(x0, sight.left)) + 2, sight.height);
  context.lineWidth = 1;
}

/**
 * No times: which rank runs which leaf, in the order of the walk.
 * @param {CanvasRenderingContext2D} context
 * @param {Sight} sight
 * @param {import("./app.js").App} app
 */
export function drawOrder(context, sight, app) {
  const { model, colours } = app;
  const leaves = app.orderedLeaves();
  const columns = Math.max(1, Math.min(leaves.length, Math.round(sight.width * 2)));
  const image = new ImageData(columns, Math.max(1, sight.ranks.length));
  const line = new Map(sight.ranks.map((rank, at) => [rank, at]));
  const ground = channelsOf(colours.kinds.idle);
  for (let at = 0; at < image.data.length; at += 4) image.data.set([...ground, 255], at);
  const cached = new Map();
  leaves.forEach((leaf, place) => {
    const column = Math.floor((place * columns) / leaves.length);
    const node = model.leaves.node[leaf];
    const category = model.categoryOf(node);
    let colour = cached.get(category);
    if (!colour) cached.set(category, (colour = channelsOf(colours.kinds[category])));
    eachRun(model.runs(model.tree.ranks, node), (rank) => {
      const row = line.get(rank);
      if (row !== undefined) image.data.set([...colour, 255], 4 * (row * columns + column));
    });
  });
  const tile = document.createElement("canvas");
  tile.width = image.width;
  tile.height = image.height;
  /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d")).putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(tile, sight.left, sight.top, sight.width, sight.height);
  context.font = `11px ${FONT}`;
  context.textBaseline = "middle";
  context.textAlign = "left";
  nameTops(context, sight, app, leaves);
  markLeaves(context, sight, app, leaves);
  drawRankNames(context, sight, app);
}

/**
 * Names of the outermost boxes above their columns: the widest first, as many as there is room for.
 * @param {CanvasRenderingContext2D} context
 * @param {Sight} sight
 * @param {import("./app.js").App} app
 * @param {number[]} leaves
 */
function nameTops(context, sight, app, leaves) {
  /** @type {{ name: string, from: number, to: number }[]} */
  const tops = [];
  let before = -1;
  leaves.forEach((leaf, place) => {
    let top = app.model.leaves.node[leaf];
    while (app.model.tree.parent[top] >= 0) top = app.model.tree.parent[top];
    if (top !== before) tops.push({ name: app.model.title(top), from: place, to: place });
    before = top;
    tops[tops.length - 1].to = place + 1;
  });
  const perLeaf = sight.width / Math.max(1, leaves.length);
  /** @type {[number, number][]} */
  const taken = [];
  for (const { name, from } of tops.sort((one, other) => other.to - other.from - (one.to - one.from))) {
    const x = sight.left + from * perLeaf;
    context.fillStyle = app.colours.quiet;
    context.fillRect(x, sight.top - 6, 1, 6);
    const width = context.measureText(name).width;
    const begin = Math.min(x + 3, sight.left + sight.width - width);
    if (taken.some(([left, right]) => begin < right + 10 && begin + width > left - 10)) continue;
    taken.push([begin, begin + width]);
    context.fillText(name, begin, 12);
  }
}

/**
 * What the selection is about, above its columns.
 * @param {CanvasRenderingContext2D} context
 * @param {Sight} sight
 * @param {import("./app.js").App} app
 * @param {number[]} leaves
 */
function markLeaves(context, sight, app, leaves) {
  const perLeaf = sight.width / Math.max(1, leaves.length);
  context.fillStyle = app.colours.accent;
  const isMarked = new Uint8Array(app.model.numLeaves);
  for (const [low, high] of app.marks.leaves) isMarked.fill(1, low, high);
  leaves.forEach((leaf, place) => {
    if (isMarked[leaf]) context.fillRect(sight.left + place * perLeaf, sight.top - 5, Math.max(1, perLeaf), 5);
  });
}

/** @param {CanvasRenderingContext2D} context @param {Sight} sight @param {string} colour */
function hatch(context, sight, colour) {
  context.strokeStyle = colour;
  context.globalAlpha = 0.5;
  context.beginPath();
  for (let x = sight.left - sight.height; x < sight.left + sight.width; x += 9) {
    context.moveTo(x, sight.top + sight.height);
    context.lineTo(x + sight.height, sight.top);
  }
  context.stroke();
  context.globalAlpha = 1;
}

/** @param {string} colour #rrggbb */
function channelsOf(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

/** @param {number[]} one @param {number[]} other @param {number} share */
function blend(one, other, share) {
  return one.map((value, at) => Math.round(value + share * (other[at] - value)));
}
