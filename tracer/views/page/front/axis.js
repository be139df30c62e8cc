/** The axis of time, above what is drawn over it. */

import { FONT } from "./board.js";
import { writeTime } from "./text.js";

/**
 * @param {CanvasRenderingContext2D} context
 * @param {{ left: number, top: number, width: number, from: number, to: number }} sight
 * @param {import("./palette.js").Colours} colours
 */
export function drawAxis(context, sight, colours) {
  const span = sight.to - sight.from;
  const rough = span / Math.max(2, sight.width / 130);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough) ?? rough;
  context.font = `11px ${FONT}`;
  context.textBaseline = "middle";
  context.textAlign = "center";
  context.fillStyle = colours.quiet;
  for (let time = Math.ceil(sight.from / step) * step; time <= sight.to; time += step) {
    const x = sight.left + ((time - sight.from) / span) * sight.width;
    context.fillText(time === 0 ? "0" : writeTime(time), Math.min(Math.max(x, sight.left + 8), sight.left + sight.width - 22), sight.top - 18);
    context.fillRect(x, sight.top - 6, 1, 5);
  }
  context.textAlign = "left";
}
