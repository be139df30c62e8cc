/** The graph's edges: wider where more bytes flow, dashed between stages and out of routing. */

/**
 * @param {CanvasRenderingContext2D} context
 * @param {import("./layout.js").Layout} layout
 * @param {{ left: number, top: number, right: number, bottom: number }} sight
 * @param {number} scale
 * @param {import("./palette.js").Colours} colours
 * @param {number} focus box whose edges stand out; -1 none
 */
export function drawTies(context, layout, sight, scale, colours, focus) {
  const far = Math.max(1, 1 / Math.max(scale, 0.1) / 2);
  for (const bright of focus >= 0 ? [false, true] : [false]) {
    for (const tie of layout.ties) {
      const isNear = tie.from === focus || tie.to === focus;
      if (isNear !== bright) continue;
      const from = layout.boxes[tie.from];
      const to = layout.boxes[tie.to];
      if (Math.max(from.x + from.width, to.x + to.width) < sight.left || Math.min(from.x, to.x) > sight.right) continue;
      if (Math.max(from.y + from.height, to.y + to.height) < sight.top || Math.min(from.y, to.y) > sight.bottom) continue;
      const weight = 0.8 + Math.min(3.4, Math.log10(1 + tie.bytes / 1024) * 0.6);
      context.lineWidth = weight * far * (bright ? 1.6 : 1);
      context.strokeStyle = bright ? colours.accent : tie.isMessage ? colours.kinds.transfer : colours.quiet;
      const reach = Math.hypot(to.x - from.x, to.y - from.y - from.height);
      context.globalAlpha = bright ? 0.95 : (focus >= 0 ? 0.25 : 0.6) / (1 + reach / 900);
      context.setLineDash(tie.isMessage || tie.isRouting ? [6 * far, 4 * far] : []);
      trace(context, from, to, far);
    }
  }
  context.globalAlpha = 1;
  context.setLineDash([]);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {import("./layout.js").Box} from
 * @param {import("./layout.js").Box} to
 * @param {number} far
 */
function trace(context, from, to, far) {
  const x0 = from.x + from.width / 2;
  const x1 = to.x + to.width / 2;
  context.beginPath();
  let y0 = from.y + from.height;
  let y1 = to.y;
  if (y1 >= y0) {
    const bend = Math.max(10, Math.min(60, (y1 - y0) / 2));
    context.moveTo(x0, y0);
    context.bezierCurveTo(x0, y0 + bend, x1, y1 - bend, x1, y1);
  } else {
    // To the side, where rows go on in a next column or lie beside each other.
    const right = x1 >= x0;
    const sx = right ? from.x + from.width : from.x;
    const tx = right ? to.x : to.x + to.width;
    y0 = from.y + from.height / 2;
    y1 = to.y + to.height / 2;
    const bend = Math.max(20, Math.abs(tx - sx) / 2) * (right ? 1 : -1);
    context.moveTo(sx, y0);
    context.bezierCurveTo(sx + bend, y0, tx - bend, y1, tx, y1);
    context.stroke();
    return;
  }
  context.stroke();
  const size = 4.5 * far;
  context.setLineDash([]);
  context.beginPath();
  context.moveTo(x1 - size, y1 - 1.6 * size);
  context.lineTo(x1, y1);
  context.lineTo(x1 + size, y1 - 1.6 * size);
  context.stroke();
}
