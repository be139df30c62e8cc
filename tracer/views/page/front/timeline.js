/** Lanes of ranks over time: every operator, every rank's part in a communication, and what ties these together. */

import { FONT, fit } from "./board.js";
import { COMMUNICATION_LANE, laneName } from "./slices.js";
import { stripes } from "./palette.js";
import { writeTime } from "./text.js";

const LEAST_LANE = 20; // pixels
const MOST_LANE = 36;
const GAP = 8;
const MOST_LINKS = 400;

export class Timeline {
  /** @param {import("./app.js").App} app */
  constructor(app) {
    this.app = app;
    this.numDrawn = 0;
    this.lane = LEAST_LANE;
    /** @type {{ lane: import("./slices.js").Lane, y: number, isFirst: boolean }[]} */
    this.rows = [];
  }

  /**
   * Lanes of the ranks on screen; all of them are as high as fits, at least as names need.
   * @param {import("./heat.js").Sight} sight
   */
  arrange(sight) {
    const { app } = this;
    const { model, state } = app;
    const wanted = new Set(sight.ranks);
    const lanes = (model.slices?.lanes ?? []).filter((lane) => wanted.has(lane.rank));
    this.lane = Math.min(MOST_LANE, Math.max(LEAST_LANE, Math.floor((sight.height - sight.ranks.length * GAP) / Math.max(1, lanes.length))));
    const total = lanes.length * this.lane + sight.ranks.length * GAP;
    state.top = Math.round(Math.min(Math.max(state.top, 0), Math.max(0, total - sight.height)));
    let y = sight.top - state.top;
    let before = -1;
    this.rows = [];
    for (const lane of lanes) {
      if (before >= 0 && lane.rank !== before) y += GAP;
      this.rows.push({ lane, y, isFirst: lane.rank !== before });
      before = lane.rank;
      y += this.lane;
    }
  }

  /** Scroll so that the first of the lanes that the selection is about stand a third down. @param {import("./heat.js").Sight} sight */
  bring(sight) {
    const { marks, state, model } = this.app;
    const own = state.selection?.kind === "slice" ? model.slices?.rank[state.selection.id] : undefined;
    state.top = 0;
    this.arrange(sight);
    const row = this.rows.find(({ lane }) => (own === undefined ? marks.ranks.has(lane.rank) : lane.rank === own));
    if (row) state.top = row.y - sight.top - sight.height / 3;
    this.arrange(sight);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {import("./heat.js").Sight} sight
   */
  draw(context, sight) {
    this.arrange(sight);
    const { app } = this;
    const { colours, marks } = app;
    this.numDrawn = 0;
    /** @type {number[]} */
    const communications = [];
    context.save();
    context.beginPath();
    context.rect(0, sight.top, sight.left + sight.width, sight.height);
    context.clip();
    context.textBaseline = "middle";
    for (const { lane, y, isFirst } of this.rows) {
      if (y + this.lane < sight.top || y > sight.top + sight.height) continue;
      context.font = `11px ${FONT}`;
      context.textAlign = "right";
      context.fillStyle = marks.ranks.has(lane.rank) ? colours.ink : colours.quiet;
      const name = laneName(lane.lane);
      context.fillText(isFirst ? `rank ${lane.rank} ${name}` : name, sight.left - 6, y + this.lane / 2);
      context.textAlign = "left";
    }
    context.beginPath();
    context.rect(sight.left, sight.top, sight.width, sight.height);
    context.clip();
    for (const { lane, y } of this.rows) {
      if (y + this.lane >= sight.top && y <= sight.top + sight.height) this.drawLane(context, lane, y, sight, communications);
    }
    this.drawLinks(context, sight, communications);
    context.restore();
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {import("./slices.js").Lane} lane
   * @param {number} y
   * @param {import("./heat.js").Sight} sight
   * @param {number[]} communications those in sight are added
   */
  drawLane(context, lane, y, sight, communications) {
    const { app } = this;
    const { model, colours, marks } = app;
    const slices = /** @type {import("./slices.js").Slices} */ (model.slices);
    const perNs = sight.width / (sight.to - sight.from);
    const right = sight.left + sight.width;
    context.fillStyle = colours.open;
    context.fillRect(sight.left, y, sight.width, this.lane - 2);
    context.font = `11px ${FONT}`;
    let last = -1;
    for (let at = slices.firstAfter(lane, sight.from); at < lane.end; at++) {
      const start = slices.start[at] * slices.tick;
      const arrive = start - slices.wait[at] * slices.tick;
      if (arrive > sight.to && slices.lane[at] !== COMMUNICATION_LANE) break;
      if (start > sight.to && arrive > sight.to) continue;
      const end = start + slices.span[at] * slices.tick;
      if (end < sight.from || !app.passesSlice(at)) continue;
      this.numDrawn++;
      const x = sight.left + (start - sight.from) * perNs;
      const width = Math.max((end - start) * perNs, 0.6);
      const isMarked = marks.nodes.has(slices.node[at]);
      if (slices.wait[at]) {
        const from = sight.left + (arrive - sight.from) * perNs;
        context.fillStyle = slices.isEstimated[at] ? stripes(context, colours.kinds.waiting, colours.open) : colours.kinds.waiting;
        context.globalAlpha = 0.55;
        context.fillRect(Math.max(from, sight.left), y + 6, Math.max(0.5, Math.min(x, right) - Math.max(from, sight.left)), this.lane - 14);
        context.globalAlpha = 1;
      }
      if (slices.lane[at] === COMMUNICATION_LANE) communications.push(at);
      const pixel = Math.floor(x + width);
      if (width < 1 && pixel === last && !isMarked) continue;
      last = pixel;
      const category = model.categoryOf(model.leaves.node[slices.leaf[at]]);
      const colour = colours.kinds[category];
      const isOn = !app.state.selection || isMarked || !marks.leaves.length || marks.leaves.some(([low, high]) => slices.leaf[at] >= low && slices.leaf[at] < high);
      context.globalAlpha = isOn ? 1 : 0.5;
      context.fillStyle = slices.isEstimated[at] ? stripes(context, colour, colours.open) : colour;
      context.fillRect(x, y + 1, Math.max(width - (width > 3 ? 1 : 0), 0.6), this.lane - 4);
      if (isMarked) {
        context.strokeStyle = colours.accent;
        context.lineWidth = 2;
        context.strokeRect(x - 1, y, Math.max(width, 3) + 2, this.lane - 2);
        context.lineWidth = 1;
      }
      if (width > 26) {
        context.globalAlpha = isOn ? 1 : 0.7;
        context.fillStyle = !isOn || slices.isEstimated[at] ? colours.ink : app.isDark ? "#111111" : category === "transfer" ? "#111111" : "#ffffff";
        const begin = Math.max(x, sight.left) + 4;
        context.fillText(fit(context, model.word(model.leaves.label, slices.leaf[at]), Math.min(x + width, right) - begin - 3), begin, y + this.lane / 2 - 1);
      }
      context.globalAlpha = 1;
    }
  }

  /**
   * Links between the parts of a communication: of the selected one, and of all where they are few.
   * @param {CanvasRenderingContext2D} context
   * @param {import("./heat.js").Sight} sight
   * @param {number[]} communications
   */
  drawLinks(context, sight, communications) {
    const { app } = this;
    const slices = /** @type {import("./slices.js").Slices} */ (app.model.slices);
    const rowOf = new Map(this.rows.map(({ lane, y }) => [`${lane.rank} ${lane.lane}`, y]));
    const draw = (/** @type {number} */ at, /** @type {boolean} */ isBright) => {
      const parts = slices.partners(at).map((part) => ({
        x: sight.left + ((slices.start[part] * slices.tick - sight.from) / (sight.to - sight.from)) * sight.width,
        y: rowOf.get(`${slices.rank[part]} ${slices.lane[part]}`),
      })).filter((part) => part.y !== undefined).sort((one, other) => Number(one.y) - Number(other.y));
      if (parts.length < 2) return;
      context.strokeStyle = isBright ? app.colours.accent : app.colours.kinds.transfer;
      context.globalAlpha = isBright ? 1 : 0.5;
      context.lineWidth = isBright ? 2 : 1;
      context.beginPath();
      parts.forEach((part, place) => {
        const y = Number(part.y) + this.lane / 2;
        if (place) context.lineTo(part.x, y);
        else context.moveTo(part.x, y);
      });
      context.stroke();
      context.globalAlpha = 1;
      context.lineWidth = 1;
    };
    if (communications.length <= MOST_LINKS) {
      const done = new Set();
      for (const at of communications) {
        if (done.has(slices.node[at])) continue;
        done.add(slices.node[at]);
        draw(at, false);
      }
    }
    for (const node of app.marks.nodes) {
      const first = slices.ofNode(node)[0];
      if (first !== undefined) draw(first, true);
    }
  }

  /**
   * The slice at a point; -1 where there is none.
   * @param {number} x
   * @param {number} y
   * @param {import("./heat.js").Sight} sight
   */
  at(x, y, sight) {
    const { app } = this;
    const { slices } = app.model;
    const row = this.rows.find((one) => y >= one.y && y < one.y + this.lane);
    if (!row || !slices || x < sight.left) return -1;
    const perNs = sight.width / (sight.to - sight.from);
    let found = -1;
    let nearest = 3;
    for (let at = slices.firstAfter(row.lane, sight.from); at < row.lane.end; at++) {
      const begin = sight.left + ((slices.start[at] - slices.wait[at]) * slices.tick - sight.from) * perNs;
      const end = sight.left + ((slices.start[at] + slices.span[at]) * slices.tick - sight.from) * perNs;
      const away = x < begin ? begin - x : x > end ? x - end : 0;
      if (away < nearest && app.passesSlice(at)) [found, nearest] = [at, away];
      if (slices.start[at] * slices.tick > sight.to && begin > x + 3 && row.lane.lane !== COMMUNICATION_LANE) break;
    }
    return found;
  }

  /** @param {number} slice */
  tell(slice) {
    const { model } = this.app;
    const slices = /** @type {import("./slices.js").Slices} */ (model.slices);
    const mark = slices.isEstimated[slice] ? "≈ " : "";
    const wait = slices.wait[slice] ? ` after waiting ${mark}${writeTime(slices.wait[slice] * slices.tick)}` : "";
    return `${model.word(model.leaves.label, slices.leaf[slice])} on rank ${slices.rank[slice]}\n` +
      `${mark}${writeTime(slices.span[slice] * slices.tick)}${wait}${mark ? " (estimated)" : ""}\n${model.path(model.leaves.node[slices.leaf[slice]]).join(" / ")}`;
  }

  /** Select the next slice of the selected one's lane. @param {number} step */
  step(step) {
    const { app } = this;
    const { slices } = app.model;
    if (!slices || !slices.length) return;
    const at = app.state.selection?.kind === "slice" ? app.state.selection.id + step : 0;
    if (at < 0 || at >= slices.length) return;
    app.select({ kind: "slice", id: at });
    const time = slices.start[at] * slices.tick;
    const [from, to] = app.state.window ?? app.model.meta.window_ns;
    if (time < from || time > to) app.change((state) => { state.window = app.views.time.clip(time - (to - from) / 2, time + (to - from) / 2); });
    const y = this.rows.find(({ lane }) => at >= lane.begin && at < lane.end)?.y ?? -Infinity;
    const sight = app.views.time.sight();
    if (y < sight.top || y + this.lane > sight.top + sight.height) this.bring(sight);
  }
}
