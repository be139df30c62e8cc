/** Search: operators, modules, layers, ranks, groups and findings by name. */

import { countRuns } from "./model.js";
import { writeCount, writeRuns } from "./text.js";

const MOST = 40;
const MOST_SORTED = 4000; // places in the graph that are put in order
const PHASES = ["forward", "prefill", "decode", "backward", "optimizer"];

/** @typedef {{ title: string, under: string, selection: import("./state.js").Selection, view: string }} Hit */

export class Search {
  /** @param {import("./app.js").App} app */
  constructor(app) {
    this.app = app;
    this.input = /** @type {HTMLInputElement} */ (document.getElementById("search"));
    this.list = /** @type {HTMLElement} */ (document.getElementById("results"));
    /** @type {Hit[]} */
    this.hits = [];
    this.at = 0;
    this.numFound = 0;
    this.isCut = false; // there may be more
    this.input.addEventListener("input", () => this.show());
    this.input.addEventListener("focus", () => this.show());
    this.input.addEventListener("blur", () => setTimeout(() => { this.list.hidden = true; }, 150));
    this.input.addEventListener("keydown", (event) => this.key_(event));
  }

  /**
   * Everything whose name holds all words.
   * @param {string} text
   * @returns {Hit[]}
   */
  find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const { model } = this.app;
    const fits = (/** @type {string} */ name) => words.every((word) => name.includes(word));
    /** @type {Hit[]} */
    const hits = [];
    const number = /^(?:rank\s*)?(\d+)$/.exec(text.trim().toLowerCase());
    if (number && model.rowOfRank.has(Number(number[1]))) {
      hits.push({ title: `rank ${number[1]}`, under: "rank", selection: { kind: "rank", id: Number(number[1]) }, view: "overview" });
    }
    const node = /^(?:node\s*)?(\d+)$/.exec(text.trim().toLowerCase());
    const [slice] = (node && model.slices?.ofNode(Number(node[1]))) || [];
    if (node && model.slices && slice !== undefined) {
      const leaf = model.slices.leaf[slice];
      hits.push({ title: `node ${node[1]}: ${model.word(model.leaves.label, leaf)}`, under: model.path(model.leaves.node[leaf]).slice(0, -1).join(" / "), selection: { kind: "slice", id: slice }, view: "time" });
    }
    for (let group = 0; group < model.groups.length && hits.length < 12; group++) {
      const runs = model.runs(model.groups.ranks, group);
      const name = `${model.word(model.groups.axis, group)} group ${model.word(model.groups.description, group)}`;
      if (countRuns(runs) > 1 && fits(name.toLowerCase())) {
        hits.push({ title: `${model.word(model.groups.axis, group)} group of ranks ${writeRuns(runs, 4)}`, under: model.word(model.groups.description, group), selection: { kind: "group", id: group }, view: "overview" });
      }
    }
    model.findings.forEach((/** @type {any} */ finding, /** @type {number} */ at) => {
      if (fits(`${finding.title} ${finding.check}`.toLowerCase())) hits.push({ title: finding.title, under: `finding · ${finding.check}`, selection: { kind: "finding", id: at }, view: "findings" });
    });
    const { tree, leaves } = model;
    /** @type {{ hit: Hit, keys: number[] }[]} */
    const found = [];
    for (const wantGroups of [true, false]) {
      for (let node = 0; node < model.numNodes && found.length < MOST_SORTED; node++) {
        if ((model.isLeaf[node] === 1) === wantGroups) continue;
        const names = model.path(node);
        const leaf = tree.low[node];
        const own = wantGroups ? names[names.length - 1] : `${names[names.length - 1]} ${model.word(leaves.op, leaf)}`;
        const whole = names.join(" ").toLowerCase();
        // The last word must be in the name itself: its whole inside would be found otherwise.
        if (fits(`${whole} ${own.toLowerCase()}`) && own.toLowerCase().includes(words[words.length - 1])) {
          const hit = { title: names[names.length - 1], under: names.slice(0, -1).join(" / "), selection: { kind: "node", id: node }, view: "graph" };
          const phase = PHASES.findIndex((one) => names[0].includes(one));
          found.push({ hit, keys: [own.toLowerCase() === text.trim().toLowerCase() ? 0 : 1, wantGroups ? 0 : 1, names.length, phase < 0 ? PHASES.length : phase, leaves.layer[leaf], node] });
        }
      }
    }
    found.sort((one, other) => { const at = one.keys.findIndex((key, place) => key !== other.keys[place]); return one.keys[at] - other.keys[at]; });
    this.numFound = hits.length + found.length;
    this.isCut = found.length >= MOST_SORTED;
    return [...hits, ...found.map(({ hit }) => hit)].slice(0, MOST);
  }

  show() {
    this.hits = this.find(this.input.value);
    this.at = 0;
    this.list.replaceChildren();
    this.list.hidden = !this.input.value.trim();
    this.hits.forEach((hit, at) => {
      const item = document.createElement("li");
      item.setAttribute("role", "option");
      item.append(Object.assign(document.createElement("b"), { textContent: hit.title }), Object.assign(document.createElement("span"), { textContent: hit.under }));
      item.addEventListener("mousedown", (event) => { event.preventDefault(); this.take(at); });
      this.list.append(item);
    });
    if (this.numFound > MOST) this.list.append(Object.assign(document.createElement("li"), { textContent: `the first ${this.hits.length} of ${this.isCut ? "more than " : ""}${writeCount(this.numFound)}: another word finds fewer`, className: "none" }));
    if (!this.hits.length) this.list.append(Object.assign(document.createElement("li"), { textContent: "nothing has such a name", className: "none" }));
    this.highlight();
  }

  highlight() {
    [...this.list.children].forEach((item, at) => {
      item.setAttribute("aria-selected", String(at === this.at));
      if (at === this.at) item.scrollIntoView({ block: "nearest" });
    });
  }

  /** @param {number} at */
  take(at) {
    const hit = this.hits[at];
    if (!hit) return;
    this.list.hidden = true;
    this.input.blur();
    this.app.goTo(hit.selection, hit.view);
  }

  /** @param {KeyboardEvent} event */
  key_(event) {
    event.stopPropagation();
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      this.at = Math.min(Math.max(this.at + (event.key === "ArrowDown" ? 1 : -1), 0), this.hits.length - 1);
      this.highlight();
    } else if (event.key === "Enter") this.take(this.at);
    else if (event.key === "Escape") {
      this.input.value = "";
      this.list.hidden = true;
      this.input.blur();
    }
  }
}
