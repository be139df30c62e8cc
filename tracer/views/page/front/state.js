/** What is on screen, and the link that brings it back. */

import { parseRuns } from "./text.js";

/** @typedef {{ kind: string, id: number }} Selection kind: node, rank, slice, group, piece, straggler, finding, cell */
/**
 * @typedef {object} State
 * @property {string} view
 * @property {"light" | "dark" | ""} theme "" follows the system
 * @property {string} metric time, waiting, bytes, imbalance, path or nodes; "" what is known
 * @property {string} place which axis colours the map of ranks, "" none
 * @property {{ rank: string, layer: string, phase: string, microbatch: string }} filters as typed
 * @property {Set<number>} open nodes of the tree
 * @property {boolean} ends whether parameters, inputs and outputs are drawn
 * @property {Selection | null} selection
 * @property {[number, number, number] | null} camera of the graph: x, y, scale; null fits
 * @property {string} heat what the heat map shows
 * @property {boolean} lanes timeline instead of heat map
 * @property {[number, number] | null} window ns; null is everything
 * @property {number} top first rank row on screen
 * @property {string} traffic which axis and kind the matrix shows, "" all
 */

const PLAIN = ["view", "theme", "metric", "place", "heat", "traffic"];
const FILTERS = /** @type {const} */ (["rank", "layer", "phase", "microbatch"]);

/** @returns {State} */
export function freshState() {
  return {
    view: "overview", theme: "", metric: "", place: "", filters: { rank: "", layer: "", phase: "", microbatch: "" },
    open: new Set(), ends: false, selection: null, camera: null, heat: "mix", lanes: false, window: null, top: 0,
    traffic: "",
  };
}

/**
 * The fragment of a link, without its #.
 * @param {State} state
 */
export function writeLink(state) {
  const fresh = /** @type {any} */ (freshState());
  const link = new URLSearchParams();
  for (const name of PLAIN) {
    const value = /** @type {any} */ (state)[name];
    if (value !== fresh[name] || name === "view") link.set(name, value);
  }
  for (const name of FILTERS) if (state.filters[name]) link.set(`f.${name}`, state.filters[name]);
  if (state.open.size) link.set("open", [...state.open].sort((one, other) => one - other).join("."));
  if (state.ends) link.set("ends", "1");
  if (state.lanes) link.set("lanes", "1");
  if (state.top) link.set("top", String(state.top));
  if (state.selection) link.set("select", `${state.selection.kind}.${state.selection.id}`);
  if (state.camera) link.set("camera", state.camera.map((value) => Number(value.toFixed(4))).join("_"));
  if (state.window) link.set("window", state.window.map((value) => Math.round(value)).join("_"));
  return link.toString();
}

/**
 * @param {string} fragment
 * @returns {State}
 */
export function readLink(fragment) {
  const state = /** @type {any} */ (freshState());
  const link = new URLSearchParams(fragment.replace(/^#/, ""));
  for (const name of PLAIN) if (link.has(name)) state[name] = link.get(name);
  for (const name of FILTERS) state.filters[name] = link.get(`f.${name}`) ?? "";
  for (const part of (link.get("open") ?? "").split(".")) if (/^\d+$/.test(part)) state.open.add(Number(part));
  state.ends = link.get("ends") === "1";
  state.lanes = link.get("lanes") === "1";
  state.top = Number(link.get("top") ?? 0) || 0;
  const selected = /^([a-z]+)\.(\d+)$/.exec(link.get("select") ?? "");
  if (selected) state.selection = { kind: selected[1], id: Number(selected[2]) };
  state.camera = numbers(link.get("camera"), 3);
  state.window = numbers(link.get("window"), 2);
  return state;
}

/**
 * @param {string | null} text
 * @param {number} count
 */
function numbers(text, count) {
  const values = (text ?? "").split("_").map(Number);
  return values.length === count && values.every(Number.isFinite) ? values : null;
}

export const NO_PHASE = "-";

/** Filters as sets; null lets everything through. */
export class Filter {
  /** @param {State["filters"]} filters */
  constructor(filters) {
    this.ranks = parseRuns(filters.rank);
    this.layers = parseRuns(filters.layer);
    this.phase = filters.phase; // NO_PHASE: what no phase was told of
    this.microbatches = parseRuns(filters.microbatch);
    this.isOn = Boolean(this.ranks || this.layers || this.phase || this.microbatches);
  }

  /** @param {string} phase "" if none was told */
  passesPhase(phase) {
    return !this.phase || (phase || NO_PHASE) === this.phase;
  }
}
