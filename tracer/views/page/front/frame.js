/** What stands around the views: a tab for each, and the filters. */

import { makeButton } from "./controls.js";
import { FindingsView } from "./findings.js";
import { GraphView } from "./graph.js";
import { Overview } from "./overview.js";
import { PathView } from "./path.js";
import { NO_PHASE, freshState } from "./state.js";
import { parseRuns } from "./text.js";
import { TimeView } from "./time.js";
import { TrafficView } from "./traffic.js";

export const VIEWS = [
  { name: "overview", title: "Overview", make: Overview },
  { name: "graph", title: "Graph", make: GraphView },
  { name: "time", title: "Time", make: TimeView },
  { name: "traffic", title: "Communication", make: TrafficView },
  { name: "path", title: "Critical path", make: PathView },
  { name: "findings", title: "Findings", make: FindingsView },
];

/** Make the views, each with its tab. @param {import("./app.js").App} app */
export function makeViews(app) {
  const tabs = /** @type {HTMLElement} */ (document.getElementById("tabs"));
  const views = /** @type {HTMLElement} */ (document.getElementById("views"));
  VIEWS.forEach((view, at) => {
    const tab = makeButton(view.title, String(at + 1), () => app.change((state) => { state.view = view.name; }));
    tab.setAttribute("role", "tab");
    tab.id = `tab-${view.name}`;
    tab.setAttribute("aria-controls", `view-${view.name}`);
    // As the audit's verdict counts: what follows from another finding is not one more.
    const num = app.model.findings.filter((/** @type {any} */ finding) => !finding.follows).length;
    if (view.name === "findings" && num) {
      tab.append(Object.assign(document.createElement("span"), { className: "count", textContent: String(num) }));
    }
    tabs.append(tab);
    const place = document.createElement("section");
    place.id = `view-${view.name}`;
    place.className = "view";
    place.setAttribute("role", "tabpanel");
    place.setAttribute("aria-labelledby", tab.id);
    views.append(place);
    app.places[view.name] = place;
    app.views[view.name] = new view.make(place, app);
  });
}

/** Let the filters change the state, and show it. @param {import("./app.js").App} app */
export function makeFilters(app) {
  const { leaves } = app.model;
  const names = [...new Set(Array.from(/** @type {Iterable<number>} */ (leaves?.phase ?? [])))].map((code) => leaves.phase.names[code]).filter(Boolean);
  const phase = /** @type {HTMLSelectElement} */ (document.getElementById("filter-phase"));
  const runsIn = Array.from({ length: app.model.numLeaves }, (_, leaf) => leaf).filter((leaf) => !app.model.isEnd[leaf]);
  const isOpen = runsIn.some((leaf) => !app.model.word(leaves.phase, leaf));
  const options = [["", "all"], ...names.map((name) => [name, name]), ...(isOpen ? [[NO_PHASE, "no phase"]] : [])];
  for (const [value, textContent] of options) phase.append(Object.assign(document.createElement("option"), { value, textContent }));
  for (const name of /** @type {const} */ (["rank", "layer", "phase", "microbatch"])) {
    const field = /** @type {HTMLInputElement} */ (document.getElementById(`filter-${name}`));
    const take = () => { if (app.state.filters[name] !== field.value) app.change((state) => { state.filters[name] = field.value; }); };
    field.addEventListener(name === "phase" ? "change" : "input", take);
    app.controls.push({ refresh: () => {
      if (field.value !== app.state.filters[name]) field.value = app.state.filters[name];
      if (name !== "phase") field.setAttribute("aria-invalid", String(field.value.trim() !== "" && !parseRuns(field.value)));
    } });
  }
  const clear = /** @type {HTMLElement} */ (document.getElementById("filter-clear"));
  clear.addEventListener("click", () => app.change((state) => { state.filters = freshState().filters; }));
  app.controls.push({ refresh: () => { clear.hidden = !app.filter.isOn; } });
  document.getElementById("filters")?.addEventListener("submit", (event) => event.preventDefault());
}
