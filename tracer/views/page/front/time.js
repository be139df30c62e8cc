/** Time: ranks over time as a heat map, and from it a timeline with lanes. */

import { drawAxis } from "./axis.js";
import { Board } from "./board.js";
import { tellScale } from "./controls.js";
import { drawHeat, drawOrder } from "./heat.js";
import { Timeline } from "./timeline.js";
import { writeCount, writeRanks, writeTime } from "./text.js";

const LEFT = 138;
const TOP = 30;

export class TimeView {
  /**
   * @param {HTMLElement} place
   * @param {import("./app.js").App} app
   */
  constructor(place, app) {
    this.app = app;
    this.tools = app.tools(place, !app.model.hasTimes ? [] : [
      app.choice("Shows", [["mix", "what each rank was at"], ["compute", "compute"], ["transfer", "transfer"], ["waiting", "waiting"], ["bubble", "bubble"]],
        () => app.state.heat, (value) => app.change((state) => { state.heat = value; state.lanes = false; })),
      app.checkbox("Timeline (T)", () => app.state.lanes, (on) => app.change((state) => { state.lanes = on; })),
      app.button("Whole step", "0", () => app.change((state) => { state.window = null; state.top = 0; })),
    ]);
    this.note = app.note(this.tools);
    const holder = document.createElement("div");
    holder.className = "board";
    place.append(holder);
    this.timeline = new Timeline(app);
    this.board = new Board(holder, "Ranks over time", {
      draw: () => this.draw(),
      hover: (x, y) => this.hover(x, y),
      click: (x, y) => this.click(x, y),
      double: (x, y) => this.double(x, y),
      drag: (x, y, dx, dy) => this.drag(x, y, dx, dy),
      drop: (x0, y0, x1) => this.drop(x0, x1),
      wheel: (x, y, event) => this.wheel(x, event),
    });
    /** @type {[number, number] | null} a stretch that is being chosen on the heat map */
    this.chosen = null;
  }

  /** Whether lanes can be drawn. */
  hasLanes() {
    return this.app.state.lanes && this.app.model.slices !== null;
  }

  /** Whether there are slices, here or beside the page. */
  canHaveLanes() {
    return this.app.model.slices !== null || this.app.remote !== null;
  }

  /** Ranks that pass the filter. */
  ranks() {
    const { model, filter } = this.app;
    return Array.from(/** @type {Iterable<number>} */ (model.ranks.rank)).filter((rank) => !filter.ranks || filter.ranks.has(rank));
  }

  /** Scroll to the lanes of what is selected. */
  bring() {
    this.board.measure();
    if (this.hasLanes()) this.timeline.bring(this.sight());
  }

  /** What is on screen. @returns {import("./heat.js").Sight} */
  sight() {
    const { state, model } = this.app;
    const whole = model.meta.window_ns ?? [0, 1];
    const [from, to] = state.window ?? whole;
    return {
      left: LEFT, top: TOP, width: Math.max(1, this.board.width - LEFT - 10), height: Math.max(1, this.board.height - TOP - 8),
      from, to, ranks: this.ranks(),
    };
  }

  draw() {
    const { app, board } = this;
    const { model, state } = app;
    if (!model.hasTimes) {
      drawOrder(board.context, this.sight(), app);
      this.note.textContent = "No time is known: columns are the folded graph's order, not time; a rank runs what is coloured.";
      return;
    }
    const sight = this.sight();
    const held = model.slices;
    app.remote?.want(sight.ranks);
    if (model.slices !== held) app.derive();
    if (this.hasLanes()) {
      this.timeline.draw(board.context, sight);
      tellScale(this.note, `${writeCount(this.timeline.numDrawn)} of ${writeCount(model.meta.num_slices)} slices in sight · ${writeTime(sight.to - sight.from)}${model.meta.is_estimated ? " · times are estimates" : ""}`, null);
    } else {
      drawHeat(board.context, sight, app);
      const parts = [writeRanks(sight.ranks.length), writeTime(sight.to - sight.from), model.meta.is_estimated ? "times are estimates" : "", app.onlyRanks(), state.lanes ? app.whyNoSlices : ""];
      tellScale(this.note, parts.filter(Boolean).join(" · "), state.heat === "mix" ? null : ["0 %", "100 %"], { isEstimated: model.meta.is_estimated });
    }
    drawAxis(board.context, sight, app.colours);
    if (this.chosen) {
      board.context.fillStyle = app.colours.accent;
      board.context.globalAlpha = 0.15;
      board.context.fillRect(this.chosen[0], TOP, this.chosen[1] - this.chosen[0], sight.height);
      board.context.globalAlpha = 1;
    }
  }

  /** @param {number} x */
  timeAt(x) {
    const sight = this.sight();
    return sight.from + ((x - sight.left) / sight.width) * (sight.to - sight.from);
  }

  /** @param {number} y */
  rankAt(y) {
    const sight = this.sight();
    return sight.ranks[Math.floor(((y - sight.top) / sight.height) * sight.ranks.length)] ?? -1;
  }

  /** @param {number} x @param {number} y */
  hover(x, y) {
    const { app } = this;
    const { model } = app;
    if (this.hasLanes()) {
      const slice = this.timeline.at(x, y, this.sight());
      return slice < 0 ? null : this.timeline.tell(slice);
    }
    const rank = this.rankAt(y);
    if (rank < 0 || x < LEFT) return null;
    if (!model.hasTimes || !model.heat) {
      const leaf = app.leafAtOrder(x, this.sight());
      return leaf < 0 ? `rank ${rank}` : `rank ${rank}\n${model.path(model.nodeOfLeaf(leaf)).join(" / ")}`;
    }
    const bins = model.meta.num_bins;
    const bin = Math.min(bins - 1, Math.max(0, Math.floor((this.timeAt(x) / model.meta.window_ns[1]) * bins)));
    const at = (model.rowOfRank.get(rank) ?? 0) * bins + bin;
    const parts = ["compute", "transfer", "waiting", "bubble"].map((name) => Math.round(model.heat[name][at] / 2.55));
    const host = Math.max(0, 100 - parts[0] - parts[1] - parts[2] - parts[3]);
    const mark = model.meta.is_estimated ? "≈ " : "";
    return `rank ${rank} at ${mark}${writeTime(this.timeAt(x))}\n${mark}compute ${parts[0]} % · transfer ${parts[1]} % · waiting ${parts[2]} % · bubble ${parts[3]} % · host ${host} %`;
  }

  /** @param {number} x @param {number} y */
  click(x, y) {
    const { app } = this;
    if (this.hasLanes()) {
      const slice = this.timeline.at(x, y, this.sight());
      app.select(slice < 0 ? null : { kind: "slice", id: slice });
      return;
    }
    const rank = this.rankAt(y);
    app.select(rank < 0 ? null : { kind: "rank", id: rank });
  }

  /** From the heat map to the timeline there, and from a slice to the graph. @param {number} x @param {number} y */
  double(x, y) {
    const { app } = this;
    if (this.hasLanes()) {
      const slice = this.timeline.at(x, y, this.sight());
      if (slice >= 0) app.goTo({ kind: "slice", id: slice }, "graph");
      return;
    }
    if (!app.model.hasTimes) {
      const leaf = app.leafAtOrder(x, this.sight());
      if (leaf >= 0) app.goTo({ kind: "node", id: app.model.nodeOfLeaf(leaf) }, "graph");
      return;
    }
    const { from, to } = this.sight();
    const middle = this.timeAt(x);
    const half = (to - from) / 20;
    app.change((state) => { state.lanes = true; state.window = this.clip(middle - half, middle + half); });
  }

  /** @param {number} x @param {number} y @param {number} dx @param {number} dy */
  drag(x, y, dx, dy) {
    const { app } = this;
    if (!app.model.hasTimes) return;
    if (!this.hasLanes()) {
      this.chosen = [Math.max(LEFT, Math.min(x - dx, this.chosen?.[0] ?? x - dx)), Math.max(LEFT, x)];
      this.app.render();
      return;
    }
    const { from, to, width } = this.sight();
    const shift = (-dx / width) * (to - from);
    app.change((state) => {
      state.window = this.clip(from + shift, to + shift);
      state.top -= dy;
    });
  }

  /** A stretch of the heat map was chosen: show its timeline. @param {number} x0 @param {number} x1 */
  drop(x0, x1) {
    if (this.hasLanes() || !this.app.model.hasTimes) return;
    const [from, to] = [this.timeAt(Math.min(x0, x1)), this.timeAt(Math.max(x0, x1))];
    this.chosen = null;
    this.app.change((state) => { state.window = this.clip(from, to); state.lanes = this.canHaveLanes(); });
  }

  /** @param {number} x @param {WheelEvent} event */
  wheel(x, event) {
    if (!this.app.model.hasTimes) return;
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      this.app.change((state) => { state.top += event.deltaY + event.deltaX; });
      return;
    }
    this.zoom(this.timeAt(x), Math.exp(event.deltaY * 0.002));
  }

  /** @param {number} middle @param {number} factor */
  zoom(middle, factor) {
    const { from, to } = this.sight();
    this.app.change((state) => { state.window = this.clip(middle - (middle - from) * factor, middle + (to - middle) * factor); });
  }

  /** @param {number} from @param {number} to @returns {[number, number]} */
  clip(from, to) {
    const [first, last] = this.app.model.meta.window_ns;
    const span = Math.min(Math.max(to - from, 200), last - first);
    const begin = Math.min(Math.max(from, first), last - span);
    return [begin, begin + span];
  }

  /** @param {KeyboardEvent} event */
  key_(event) {
    const { app } = this;
    const { from, to } = this.sight();
    const span = to - from;
    if (event.key === "t" || event.key === "T") app.change((state) => { state.lanes = !state.lanes; });
    else if (event.key === "0") app.change((state) => { state.window = null; state.top = 0; });
    else if (!app.model.hasTimes) return false;
    else if (event.key === "+" || event.key === "=") this.zoom((from + to) / 2, 0.7);
    else if (event.key === "-") this.zoom((from + to) / 2, 1.4);
    else if (event.key === "ArrowLeft") app.change((state) => { state.window = this.clip(from - span / 8, to - span / 8); });
    else if (event.key === "ArrowRight") app.change((state) => { state.window = this.clip(from + span / 8, to + span / 8); });
    else if (event.key === "ArrowDown") app.change((state) => { state.top += 60; });
    else if (event.key === "ArrowUp") app.change((state) => { state.top -= 60; });
    else if (event.key === "Enter" && app.state.selection?.kind === "slice") app.goTo(app.state.selection, "graph");
    else if (event.key === "n" || event.key === "p") this.timeline.step(event.key === "n" ? 1 : -1);
    else return false;
    return true;
  }
}
