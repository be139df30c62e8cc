/** The panel beside the views: everything that is known of what is selected, and the ways to it in each view. */

import { causeOf, placeOf } from "./findings.js";
import { laneName } from "./slices.js";
import { countRuns } from "./model.js";
import { toRuns, writeBytes, writeCount, writeEither, writeError, writeFlops, writeRanks, writeRuns, writeShares, writeTime } from "./text.js";

const MOST_BARS = 64;

export class Detail {
  /**
   * @param {HTMLElement} place
   * @param {import("./app.js").App} app
   */
  constructor(place, app) {
    this.place = place;
    this.app = app;
    this.key = "";
  }

  refresh() {
    const { app } = this;
    const { selection } = app.state;
    const key = JSON.stringify([selection, app.state.view, app.state.filters, app.state.theme, app.isDark, app.model.slices !== null]);
    if (key === this.key) return;
    this.key = key;
    this.place.replaceChildren();
    if (!selection) return this.about();
    if (selection.kind === "node") this.node(selection.id);
    else if (selection.kind === "rank") this.rank(selection.id);
    else if (selection.kind === "group") this.group(selection.id);
    else if (selection.kind === "slice") this.slice(selection.id);
    else if (selection.kind === "piece") this.piece(selection.id);
    else if (selection.kind === "straggler") this.straggler(selection.id);
    else if (selection.kind === "cell") this.cell(selection.id);
    else if (selection.kind === "finding") this.finding(selection.id);
    this.places(selection);
    return undefined;
  }

  /** Nothing is selected: what this page is about. */
  about() {
    const { meta, tree } = this.app.model;
    this.head("The run", "");
    const total = (/** @type {{ [kind: string]: number }} */ counts) => Object.values(counts).reduce((sum, count) => sum + count, 0);
    const rows = [
      ["Strategy", meta.strategy ?? "untold"], ["Ranks", writeCount(meta.world_size)],
      ["Time", meta.window_ns ? `${meta.is_estimated ? "≈ " : ""}${writeTime(meta.window_ns[1])}` : "none was measured"],
      ["Nodes", writeCount(total(meta.nodes))],
      ...Object.entries(meta.nodes).map(([kind, count]) => [`\u2003${kind}`, writeCount(count)]),
      ["Edges", writeCount(total(meta.edges))],
      ...Object.entries(meta.edges).map(([kind, count]) => [`\u2003${kind}`, writeCount(count)]),
      ...[["Measured", meta.num_measured], ["Estimated", meta.num_estimated]].filter(([, count]) => count).map(([name, count]) => [name, `${writeCount(count)} nodes`]),
      ["Folded to", `${writeCount(this.app.model.numLeaves)} operators in ${writeCount(tree.length)} boxes`],
      ["Recorded by", `truedag ${meta.truedag}, ${meta.recorder}, torch ${meta.torch}`],
    ];
    if (meta.num_decode_steps) rows.push(["Decode", `${writeCount(meta.num_decode_steps)} steps are one in the graph; ${writeCount(meta.num_carried_edges)} edges lead from one of them to another`]);
    if (meta.missing_ranks?.length) rows.push(["Missing ranks", meta.missing_ranks.join(", ")]);
    if (meta.dry) rows.push(["Dry run", "executed on tensors without memory: nothing was computed or measured"]);
    const { estimate } = meta;
    if (estimate) {
      const used = estimate.model_flops_utilization;
      rows.push(["Estimated for", `${estimate.device}, ${writeCount(estimate.gpus_per_node)} a node`]);
      if (estimate.prefill_ns >= 0 && estimate.prefill_ns !== null) rows.push(["First token", `≈ ${writeTime(estimate.prefill_ns)}`], ["All tokens", `≈ ${writeTime(estimate.step_ns)}`]);
      else rows.push(["Step", `≈ ${writeTime(estimate.step_ns)}`]);
      if (used >= 0) rows.push(["MFU", `≈ ${(100 * used).toPrecision(3)} % of the peak FLOP/s`]);
    }
    this.facts(/** @type {[string, string][]} */ (rows));
    if (estimate) this.notes("What the estimate assumes", [...estimate.assumptions, ...(meta.dry?.assumed ?? [])]);
    this.text("Click anything. Double-click opens it, ? lists the keys. The link in the address bar brings back what you see.");
  }

  /** @param {number} id */
  node(id) {
    const { model } = this.app;
    if (id >= model.numNodes) return;
    const { tree, leaves } = model;
    const path = model.path(id);
    this.head(path[path.length - 1], path.slice(0, -1).join(" / "));
    const runs = model.runs(tree.ranks, id);
    const batches = model.runs(tree.microbatches, id);
    /** @type {[string, string][]} */
    const rows = [["Stands for", `${writeCount(tree.num_nodes[id])} nodes on ${writeRanks(countRuns(runs))}`], ["Ranks", writeRuns(runs)]];
    if (batches.length) rows.push(["Microbatches", writeRuns(batches)]);
    if (model.isLeaf[id]) {
      const leaf = tree.low[id];
      rows.push(["Kind", `${model.word(leaves.kind, leaf)}, ${model.word(leaves.category, leaf)}`], ["Operator", model.word(leaves.op, leaf)]);
      if (model.word(leaves.module, leaf)) rows.push(["Module", model.word(leaves.module, leaf)]);
      if (leaves.expert[leaf] >= 0) rows.push(["Expert", String(leaves.expert[leaf])]);
      rows.push(["In", model.word(leaves.inputs, leaf) || "–"], ["Out", model.word(leaves.outputs, leaf) || "–"]);
      if (leaves.num_shapes[leaf] > 1) rows.push(["", `the first of ${writeCount(leaves.num_shapes[leaf])} different shapes`]);
    } else rows.push(["Operators", writeCount(tree.high[id] - tree.low[id])]);
    rows.push(["Time on a rank, mean", writeEither(tree.mean_ns[id], tree.estimated_mean_ns[id])]);
    const worst = tree.mean_ns[id] >= 0 ? tree.worst_rank[id] : tree.estimated_rank[id];
    rows.push(["maximum", writeEither(tree.max_ns[id], tree.estimated_max_ns[id]) + (worst >= 0 ? ` (rank ${worst})` : "")]);
    if (tree.call_mean_ns[id] >= 0) {
      rows.push(["One call, mean", writeTime(tree.call_mean_ns[id])], ["longest", `${writeTime(tree.call_max_ns[id])} (rank ${tree.call_rank[id]})`]);
    }
    const waiter = tree.wait_mean_ns[id] >= 0 ? tree.wait_rank[id] : tree.estimated_wait_rank[id];
    if (waiter >= 0) {
      rows.push(["Waiting on a rank, mean", writeEither(tree.wait_mean_ns[id], tree.estimated_wait_mean_ns[id])]);
      rows.push(["maximum", `${writeEither(tree.wait_max_ns[id], tree.estimated_wait_max_ns[id])} (rank ${waiter})`]);
    }
    if (tree.num_communications[id]) rows.push(["Communications", `${writeCount(tree.num_communications[id])}, ${writeBytes(tree.sent_bytes[id])} given`]);
    if (tree.flops[id] > 0) rows.push(["Arithmetic", writeFlops(tree.flops[id])]);
    if (tree.bytes_read[id] + tree.bytes_written[id] > 0) rows.push(["Memory", `${writeBytes(tree.bytes_read[id])} read, ${writeBytes(tree.bytes_written[id])} written`]);
    const unknown = tree.num_nodes[id] - tree.num_measured[id] - tree.num_estimated[id];
    const parts = [[tree.num_measured[id], "measured"], [tree.num_estimated[id], "estimated"], [unknown, "unknown"]].filter(([count]) => count);
    rows.push(["Times are", parts.map(([count, word]) => `${writeCount(Number(count))} ${word}`).join(", ")]);
    this.facts(rows);
    if (this.app.filter.isOn) this.text("These are of the whole box: a filter hides boxes, and does not change what they stand for.");
    this.bars(tree.low[id], tree.high[id]);
  }

  /** How long each rank took: the slowest first. @param {number} low @param {number} high */
  bars(low, high) {
    const { slices } = this.app.model;
    if (!slices) return;
    const totals = [...slices.totals(low, high)].sort((one, other) => other[1].time - one[1].time);
    if (totals.length < 2) return;
    const most = Math.max(...totals.map(([, sum]) => sum.time + sum.wait), 1);
    const box = document.createElement("div");
    box.className = "bars";
    box.append(Object.assign(document.createElement("h3"), { textContent: "By rank: time, and waiting before it" }));
    for (const [rank, sum] of totals.slice(0, MOST_BARS)) {
      const row = document.createElement("button");
      row.type = "button";
      const mark = sum.isEstimated ? "≈ " : "";
      row.title = `${writeCount(sum.calls)} calls, ${mark}${writeTime(sum.time)}, waited ${mark}${writeTime(sum.wait)}`;
      const name = Object.assign(document.createElement("span"), { textContent: `rank ${rank}`, className: "name" });
      const track = Object.assign(document.createElement("span"), { className: "track" });
      track.append(bar("time", (100 * sum.time) / most, sum.isEstimated), bar("wait", (100 * sum.wait) / most, sum.isEstimated));
      row.append(name, track, Object.assign(document.createElement("span"), { textContent: mark + writeTime(sum.time), className: "value" }));
      row.addEventListener("click", () => this.app.select({ kind: "rank", id: rank }));
      box.append(row);
    }
    if (totals.length > MOST_BARS) box.append(Object.assign(document.createElement("p"), { textContent: `${MOST_BARS} slowest of ${totals.length} ranks` }));
    this.place.append(box);
  }

  /** @param {number} rank */
  rank(rank) {
    const { model } = this.app;
    const row = model.rowOfRank.get(rank);
    if (row === undefined) return;
    const { ranks } = model;
    this.head(`Rank ${rank}`, model.word(ranks.host, row) ? `${model.word(ranks.host, row)} · ${model.word(ranks.device, row)}` : "");
    const axes = ["tp", "ep", "etp", "pp", "dp", "edp", "cp"].filter((axis) => ranks[axis][row] >= 0);
    /** @type {[string, string][]} */
    const rows = [["Place", axes.map((axis) => `${axis} ${ranks[axis][row]}`).join(" · ") || "untold"]];
    if (ranks.rank_class[row] >= 0) rows.push(["Rank class", String(ranks.rank_class[row])]);
    const spent = ["compute", "transfer", "waiting", "bubble", "host"].map((name) => ranks[`${name}_ns`][row]);
    const shares = writeShares(spent);
    const mark = model.meta.is_estimated ? "≈ " : "";
    if (!model.hasTimes) rows.push(["Its time", "unknown"]);
    else ["Compute", "Transfer, exposed", "Waiting for others", "Pipeline bubble", "Host"].forEach((label, at) => {
      rows.push([label, spent[at] >= 0 ? `${mark}${writeTime(spent[at])}${shares ? ` · ${shares[at]}` : ""}` : "unknown"]);
    });
    if (model.hasTimes) rows.push(["Transfer hidden by compute", ranks.overlap_ns[row] >= 0 ? mark + writeTime(ranks.overlap_ns[row]) : "unknown"]);
    rows.push(["Given to communications", writeBytes(ranks.sent_bytes[row])]);
    if (model.meta.num_measured) rows.push(["Clock error", writeError(ranks.clock_error_ns[row])]);
    this.facts(rows);
    this.groups("Its process groups", ...this.app.groupsOf(rank).map((group) => group.id));
  }

  /** Groups that can be chosen. @param {string} title @param {number[]} ids */
  groups(title, ...ids) {
    const { model } = this.app;
    const list = document.createElement("div");
    list.className = "groups";
    list.append(Object.assign(document.createElement("h3"), { textContent: title }));
    for (const id of ids.filter((one) => one >= 0)) {
      const runs = model.runs(model.groups.ranks, id);
      list.append(this.app.button(`${model.word(model.groups.axis, id) || "unnamed"} · ${writeRanks(countRuns(runs))}: ${writeRuns(runs, 4)}`, "", () => this.app.select({ kind: "group", id })));
    }
    if (list.children.length > 1) this.place.append(list);
  }

  /** @param {number} id */
  group(id) {
    const { model } = this.app;
    if (id >= model.groups.length) return;
    const runs = model.runs(model.groups.ranks, id);
    this.head(`${model.word(model.groups.axis, id) || "Unnamed"} group`, model.word(model.groups.description, id));
    /** @type {Map<number, number>} how often of each kind, on the rank that did it most: one may be missing */
    const kinds = new Map();
    let bytes = 0;
    for (let at = 0; at < (model.collectives?.length ?? 0); at++) {
      if (model.collectives.group[at] !== model.groups.group[id]) continue;
      const kind = model.collectives.kind[at];
      kinds.set(kind, Math.max(kinds.get(kind) ?? 0, model.collectives.num[at]));
      bytes += model.collectives.bytes[at] || 0;
    }
    const num = [...kinds.values()].reduce((sum, one) => sum + one, 0);
    this.facts([["Ranks", writeRuns(runs, 30)], ["Size", String(countRuns(runs))], ["Collectives", num ? writeCount(num) : "none"], ...(num ? [["Bytes given", writeBytes(bytes)]] : [])]);
  }

  /** @param {number} id */
  slice(id) {
    const { model } = this.app;
    const { slices, leaves } = model;
    if (!slices || id >= slices.length) return;
    const leaf = slices.leaf[id];
    this.head(model.word(leaves.label, leaf), model.path(leaves.node[leaf]).slice(0, -1).join(" / "));
    const mark = slices.isEstimated[id] ? "≈ " : "";
    /** @type {[string, string][]} */
    const rows = [
      ["Node", String(slices.node[id])], ["Rank", `${slices.rank[id]}, ${laneName(slices.lane[id])}`], ["Operator", model.word(leaves.op, leaf)],
      ["Starts at", mark + writeTime(slices.start[id] * slices.tick)], [mark ? "Takes, estimated" : "Takes", mark + writeTime(slices.span[id] * slices.tick)],
    ];
    if (slices.microbatch[id] >= 0) rows.push(["Microbatch", String(slices.microbatch[id])]);
    rows.push(["In", model.word(leaves.inputs, leaf) || "–"], ["Out", model.word(leaves.outputs, leaf) || "–"]);
    const parts = slices.partners(id);
    if (parts.length > 1) rows.push(["Waited before", mark + writeTime(slices.wait[id] * slices.tick)], ["Participants", writeRanks(parts.length)]);
    this.facts(rows);
    if (parts.length > 1) {
      const list = document.createElement("div");
      list.className = "bars";
      list.append(Object.assign(document.createElement("h3"), { textContent: "Each rank's part: waiting, then transfer" }));
      const most = Math.max(...parts.map((part) => slices.wait[part] + slices.span[part]), 1);
      for (const part of parts.slice(0, MOST_BARS)) {
        const row = document.createElement("button");
        row.type = "button";
        const track = Object.assign(document.createElement("span"), { className: "track" });
        track.append(bar("wait", (100 * slices.wait[part]) / most, slices.isEstimated[part] === 1), bar("move", (100 * slices.span[part]) / most, slices.isEstimated[part] === 1));
        row.append(Object.assign(document.createElement("span"), { textContent: `rank ${slices.rank[part]}`, className: "name" }), track,
          Object.assign(document.createElement("span"), { textContent: mark + writeTime((slices.wait[part] + slices.span[part]) * slices.tick), className: "value" }));
        row.addEventListener("click", () => this.app.select({ kind: "slice", id: part }));
        list.append(row);
      }
      this.place.append(list);
    }
  }

  /** @param {number} id */
  piece(id) {
    const { model } = this.app;
    const { pieces, leaves } = model;
    if (!pieces || id >= pieces.length) return;
    const leaf = pieces.leaf[id];
    const spent = model.word(pieces.spent, id);
    const mark = model.meta.is_estimated ? "≈ " : "";
    this.head(`${spent === "host" ? "Host, before " : ""}${model.word(leaves.label, leaf)}`, `on the critical path, piece ${id + 1} of ${writeCount(pieces.length)}`);
    this.facts([["Spent on", spent], ["Rank", String(pieces.rank[id])], ["Starts at", mark + writeTime(pieces.start_ns[id])],
      ["Takes", mark + writeTime(pieces.end_ns[id] - pieces.start_ns[id])], ["Node", String(pieces.node[id])], ["In", model.path(leaves.node[leaf]).slice(0, -1).join(" / ")]]);
  }

  /** @param {number} id */
  straggler(id) {
    const { model } = this.app;
    const { stragglers } = model;
    if (!stragglers || id >= stragglers.length) return;
    this.head(`Rank ${stragglers.rank[id]} came last`, `to ${model.word(stragglers.label, id)}`);
    const mark = model.meta.is_estimated ? "≈ " : "";
    /** @type {[string, string][]} */
    const rows = [["Behind the last but one", mark + writeTime(stragglers.late_ns[id])], ["All others waited", mark + writeTime(stragglers.waited_ns[id])], ["Node", String(stragglers.node[id])]];
    if (stragglers.held_rank[id] >= 0) {
      rows.push(["Held up by", `${model.word(stragglers.held_spent, id)}: ${model.word(stragglers.held_label, id)} on rank ${stragglers.held_rank[id]}, ${mark}${writeTime(stragglers.held_ns[id])}`]);
    }
    rows.push(["In", model.path(model.leaves.node[stragglers.leaf[id]]).slice(0, -1).join(" / ")]);
    this.facts(rows);
    this.groups("Its process group", model.groups.group.indexOf(stragglers.group[id]));
  }

  /** @param {number} id */
  cell(id) {
    const { model } = this.app;
    if (id >= model.cells.length) return;
    const [head, ...lines] = this.app.views.overview.tell(id).split("\n");
    this.head(head, lines.join("\n"));
  }

  /** @param {number} id */
  finding(id) {
    const finding = this.app.model.findings[id];
    if (!finding) return;
    this.head(finding.title, `${finding.severity} · ${finding.check}`);
    this.facts([["Expected", finding.expected], ["Found", finding.found], ["Do", finding.fix], ["Where", placeOf(finding) || "unknown"], ...(finding.follows ? [["Follows from", causeOf(this.app.model, finding)]] : [])]);
  }

  /** Ways to the same thing in other views. @param {import("./state.js").Selection} selection */
  places(selection) {
    const { app } = this;
    const row = document.createElement("div");
    row.className = "places";
    for (const view of app.viewsFor(selection, app.state.view)) row.append(app.button(`Show in ${view.title.toLowerCase()}`, "", () => app.goTo(selection, view.name)));
    const { ranks } = app.marks;
    const told = writeRuns(toRuns(ranks), Infinity);
    if (ranks.size && ranks.size < app.model.ranks.length && told !== app.state.filters.rank) {
      const only = ranks.size === 1 ? `Only rank ${told}` : `Only its ${writeRanks(ranks.size)}`;
      row.append(app.button(only, "", () => app.change((state) => { state.filters.rank = told; state.top = 0; })));
    }
    this.place.append(row);
  }

  /** @param {string} title @param {string} under */
  head(title, under) {
    const head = Object.assign(document.createElement("h2"), { textContent: title });
    this.place.append(head);
    if (under) this.place.append(Object.assign(document.createElement("p"), { textContent: under, className: "under" }));
  }

  /** A list that opens. @param {string} title @param {string[]} texts */
  notes(title, texts) {
    const box = document.createElement("details");
    const list = document.createElement("ul");
    list.append(...texts.map((text, at) => Object.assign(document.createElement("li"), { textContent: `${text}${at < texts.length - 1 ? "; " : "."}` })));
    box.append(Object.assign(document.createElement("summary"), { textContent: title }), list);
    this.place.append(box);
  }

  /** @param {string} text */
  text(text) {
    this.place.append(Object.assign(document.createElement("p"), { textContent: text }));
  }

  /** @param {[string, string][]} rows */
  facts(rows) {
    const list = document.createElement("dl");
    for (const [name, value] of rows) {
      const told = Object.assign(document.createElement("dd"), { textContent: value });
      if (value.startsWith("≈")) told.className = "estimated";
      if (value === "unknown") told.className = "unknown";
      list.append(Object.assign(document.createElement("dt"), { textContent: name }), told);
    }
    this.place.append(list);
  }
}

/** @param {string} kind @param {number} percent @param {boolean} isEstimated */
function bar(kind, percent, isEstimated) {
  const made = Object.assign(document.createElement("span"), { className: `bar ${kind}${isEstimated ? " estimated" : ""}` });
  made.style.width = `${percent}%`;
  return made;
}
