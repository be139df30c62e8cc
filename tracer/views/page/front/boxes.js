/** How the graph's boxes look: open ones are frames with a title, closed ones say what they stand for. */

import { FONT, fit } from "./board.js";
import { countRuns } from "./model.js";
import { stripes } from "./palette.js";
import { writeBytes, writeCount, writeExcess, writeFlops, writeRanks, writeTime } from "./text.js";

const LEGIBLE = 0.33; // scale from which boxes have text

/** @typedef {{ isSelected: boolean, isMarked: boolean }} Look */

/**
 * @param {CanvasRenderingContext2D} context
 * @param {import("./app.js").App} app
 * @param {import("./layout.js").Box} box
 * @param {number} scale
 * @param {Look} look
 */
export function drawFrame(context, app, box, scale, look) {
  const { colours, state } = app;
  context.beginPath();
  context.roundRect(box.x, box.y, box.width, box.height, 8);
  context.fillStyle = colours.open;
  context.fill();
  context.strokeStyle = look.isSelected || look.isMarked ? colours.accent : colours.line;
  context.lineWidth = (look.isSelected ? 2.5 : 1.2) / Math.min(scale, 1);
  context.stroke();
  if (scale < LEGIBLE / 2) return;
  const size = Math.min(15, Math.max(13, 11 / scale));
  context.font = `600 ${size}px ${FONT}`;
  context.fillStyle = colours.ink;
  context.textBaseline = "middle";
  const name = `▾ ${app.model.title(box.node)}`;
  const title = fit(context, name, box.width - 20);
  context.fillText(title, box.x + 12, box.y + 16);
  const left = context.measureText(title).width + 26;
  context.font = `${size - 1.5}px ${FONT}`;
  context.fillStyle = colours.quiet;
  context.fillText(fit(context, figureOf(app.model, box.node, state.metric), box.width - left - 10), box.x + left, box.y + 16);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {import("./app.js").App} app
 * @param {import("./layout.js").Box} box
 * @param {number} scale
 * @param {Look} look
 * @param {number} most the largest amount of what is in the same box, that bars are drawn to
 */
export function drawBox(context, app, box, scale, look, most) {
  const { model, colours, state } = app;
  const { isSelected, isMarked } = look;
  const category = model.categoryOf(box.node);
  const isLeaf = model.isLeaf[box.node] === 1;
  const kindColour = isLeaf ? colours.kinds[category] : colours.quiet;
  outline(context, box, isLeaf ? category : "group");
  context.fillStyle = colours.box;
  context.fill();
  context.save();
  context.clip();
  const { value, isEstimated } = model.amount(box.node, state.metric);
  const share = value >= 0 && most ? value / most : 0;
  if (share > 0) {
    const bar = isLeaf ? kindColour : colours.kinds[state.metric === "waiting" ? "waiting" : state.metric === "bytes" ? "transfer" : "compute"];
    context.globalAlpha = isEstimated ? 1 : 0.3;
    context.fillStyle = isEstimated ? stripes(context, bar, colours.box) : bar;
    context.fillRect(box.x, box.y + box.height - 7, Math.max(2, box.width * share), 7);
    context.globalAlpha = 1;
  }
  context.restore();
  outline(context, box, isLeaf ? category : "group");
  context.strokeStyle = isSelected || isMarked ? colours.accent : kindColour;
  context.lineWidth = (isSelected ? 3 : isMarked ? 2.2 : 1.2) / Math.min(1, Math.max(scale, 0.35));
  const isKnown = value >= 0 || !model.hasTimes || (state.metric === "waiting" && !model.tree.num_communications[box.node]);
  context.setLineDash(isKnown ? [] : [4, 3]);
  context.stroke();
  context.setLineDash([]);
  if (scale < LEGIBLE) {
    if (scale < LEGIBLE / 2) return;
    // From afar the name alone, as large as the box lets it be.
    context.font = `600 ${Math.min(30, 9 / scale)}px ${FONT}`;
    context.fillStyle = colours.ink;
    context.textBaseline = "middle";
    context.fillText(fit(context, shorten(model.title(box.node)), box.width - 12), box.x + 8, box.y + box.height / 2 - 3);
    return;
  }
  const inset = isLeaf && category !== "compute" && category !== "ends" ? 18 : 10;
  const width = box.width - 2 * inset;
  context.textBaseline = "middle";
  context.fillStyle = colours.ink;
  context.font = `600 13px ${FONT}`;
  context.fillText(fit(context, (isLeaf ? "" : "▸ ") + model.title(box.node), width), box.x + inset, box.y + 15);
  context.font = `11px ${FONT}`;
  context.fillStyle = colours.quiet;
  context.fillText(fit(context, multiplicity(model, box.node), width), box.x + inset, box.y + 30);
  context.fillText(fit(context, figureOf(model, box.node, state.metric), width), box.x + inset, box.y + 44);
}

/**
 * How many nodes of the graph a box stands for, on how many ranks.
 * @param {import("./model.js").Model} model
 * @param {number} node
 */
export function multiplicity(model, node) {
  return `×${writeCount(model.tree.num_nodes[node])} on ${writeRanks(countRuns(model.runs(model.tree.ranks, node)))}`;
}

/**
 * A box's amount in words: mean, maximum and the worst rank.
 * @param {import("./model.js").Model} model
 * @param {number} node
 * @param {string} metric
 */
export function figureOf(model, node, metric) {
  const { tree } = model;
  if (metric === "bytes") {
    if (tree.sent_bytes[node] > 0) return `${writeBytes(tree.sent_bytes[node])} sent`;
    return tree.flops[node] > 0 ? `nothing sent · ${writeFlops(tree.flops[node])}` : "nothing sent";
  }
  if (metric === "nodes") return `${writeCount(tree.high[node] - tree.low[node])} operators`;
  if (metric === "path") {
    const { value, isEstimated } = model.amount(node, metric);
    return value > 0 ? `${isEstimated ? "≈ " : ""}${writeTime(value)} of the critical path` : "not on the critical path";
  }
  if (metric === "imbalance") {
    const { value, isEstimated } = model.amount(node, metric);
    return value >= 0 ? `${isEstimated ? "≈ " : ""}${writeExcess(value)} above the mean (rank ${isEstimated ? tree.estimated_rank[node] : tree.worst_rank[node]})` : "time unknown";
  }
  if (metric === "waiting") {
    const isSure = tree.wait_mean_ns[node] >= 0;
    const mean = isSure ? tree.wait_mean_ns[node] : tree.estimated_wait_mean_ns[node];
    if (!(mean >= 0)) return model.tree.num_communications[node] ? "waiting unknown" : "nothing to wait for";
    const most = isSure ? tree.wait_max_ns[node] : tree.estimated_wait_max_ns[node];
    return most > 0 ? `waits ${spread(model, node, mean, most, isSure ? tree.wait_rank[node] : tree.estimated_wait_rank[node], isSure)}` : "nobody waits";
  }
  const isMeasured = tree.mean_ns[node] >= 0;
  const mean = isMeasured ? tree.mean_ns[node] : tree.estimated_mean_ns[node];
  if (!(mean >= 0)) return "time unknown";
  const most = isMeasured ? tree.max_ns[node] : tree.estimated_max_ns[node];
  const worst = isMeasured ? tree.worst_rank[node] : tree.estimated_rank[node];
  return spread(model, node, mean, most, worst, isMeasured);
}

/**
 * Mean, maximum and the worst rank, or that all ranks are alike.
 * @param {import("./model.js").Model} model
 * @param {number} node
 * @param {number} mean
 * @param {number} most
 * @param {number} worst
 * @param {boolean} isMeasured
 */
function spread(model, node, mean, most, worst, isMeasured) {
  const isEven = writeTime(most) === writeTime(mean) && countRuns(model.runs(model.tree.ranks, node)) > 1;
  return `${isMeasured ? "" : "≈ "}${writeTime(mean)}${isEven ? " on each" : `, max ${writeTime(most)} (rank ${worst})`}`;
}

/** A name for a box that is seen from afar. @param {string} name */
function shorten(name) {
  return name.replace("stage ", "s").replace("forward", "fwd").replace("backward", "bwd").replace("optimizer", "opt").replace(" · ", " ");
}

/**
 * Ellipses are communication, parallelograms routing, rectangles computation.
 * @param {CanvasRenderingContext2D} context
 * @param {import("./layout.js").Box} box
 * @param {string} form
 */
function outline(context, box, form) {
  const { x, y, width, height } = box;
  context.beginPath();
  if (form === "transfer") context.roundRect(x, y, width, height, height / 2);
  else if (form === "routing") {
    context.moveTo(x + 12, y);
    context.lineTo(x + width, y);
    context.lineTo(x + width - 12, y + height);
    context.lineTo(x, y + height);
    context.closePath();
  } else context.roundRect(x, y, width, height, form === "group" ? 8 : 2);
}
