/** Starts the page. */

import { App } from "./app.js";
import { listenToKeys } from "./keys.js";
import { Model } from "./model.js";
import { readPayload } from "./payload.js";
import { Search } from "./search.js";
import { Slices } from "./slices.js";
import { Remote } from "./remote.js";
import { Repeated } from "./repeated.js";

const begun = performance.now();

async function start() {
  const text = /** @type {HTMLElement} */ (document.getElementById("payload"));
  const payload = await readPayload(text.textContent ?? "");
  text.remove();
  const model = new Model(payload);
  const { slices, pairs, turns, moved } = payload.tables;
  const repeated = slices && turns ? new Repeated(model, { slices, turns, moved, pairs }) : null;
  if (repeated && model.meta.num_slices <= model.meta.most_slices) model.slices = repeated.make(Array.from(model.ranks.rank));
  else if (slices && !repeated) model.slices = new Slices(slices, model.meta.tick_ns, pairs);
  const app = new App(model);
  app.pairs = pairs;
  if (model.meta.slices_file) app.remote = new Remote(app);
  else if (repeated && !model.slices) {
    repeated.app = app;
    app.remote = repeated;
  }
  const search = new Search(app);
  listenToKeys(app, search);
  const { meta } = model;
  const subtitle = /** @type {HTMLElement} */ (document.getElementById("subtitle"));
  subtitle.textContent = subtitle.title = [meta.note, app.summary()].filter(Boolean).join(" · ");
  legend();
  // A link to a finding in the graph, as drawings have it, leads to its place; one from here says what is open there.
  const { selection, view, open } = app.state;
  if (selection?.kind === "finding" && view === "graph" && !open.size) app.goTo(selection, view);
  else app.renderNow();
  Object.assign(window, { truedag: { app, model, loadMs: performance.now() - begun, openedMs: performance.now() } });
  document.documentElement.dataset.ready = "1";
  // While nobody waits: the first box opens as fast as the others then.
  requestIdleCallback(() => app.views.graph.refresh());
}

/** How measured, estimated and unknown look, in every view. */
function legend() {
  const place = /** @type {HTMLElement} */ (document.getElementById("legend"));
  for (const [kind, name] of [["compute", "compute"], ["transfer", "communication"], ["waiting", "waiting"], ["bubble", "bubble"], ["host", "host"], ["routing", "routing"]]) {
    place.append(Object.assign(document.createElement("i"), { className: `swatch ${kind}` }), ` ${name} `);
  }
  place.append(Object.assign(document.createElement("i"), { className: "swatch measured" }), " measured ");
  place.append(Object.assign(document.createElement("i"), { className: "swatch estimated" }), " ≈ estimated ");
  place.append(Object.assign(document.createElement("i"), { className: "swatch unknown" }), " unknown");
}

start().catch((error) => {
  document.documentElement.dataset.ready = "failed";
  const told = Object.assign(document.createElement("p"), { className: "empty", textContent: `This page could not be opened: ${error}. It needs a browser of 2023 or newer.` });
  document.getElementById("views")?.append(told);
  throw error;
});
