/** What an audit found: each finding leads to its place. */

import { toRuns, writeCount, writeRuns } from "./text.js";

export class FindingsView {
  /**
   * @param {HTMLElement} place
   * @param {import("./app.js").App} app
   */
  constructor(place, app) {
    this.app = app;
    this.place = place;
    this.isFilled = false;
  }

  /** Made when it is first looked at. */
  fill() {
    const { app, place } = this;
    const { audit, unmatched, num_unmatched: numUnmatched } = app.model.meta;
    const list = document.createElement("div");
    list.className = "findings";
    place.append(list);
    const verdict = Object.assign(document.createElement("p"), { className: "verdict" });
    verdict.textContent = audit ? audit.verdict : `No audit: ${app.model.whyNoAudit || "none was made for this page"}.`;
    if (audit) verdict.append(Object.assign(document.createElement("span"), { textContent: `Compared with ${audit.against}.` }));
    list.append(verdict);
    app.model.findings.forEach((/** @type {any} */ finding, /** @type {number} */ at) => list.append(this.card(finding, at)));
    if (numUnmatched) {
      const box = document.createElement("details");
      box.append(Object.assign(document.createElement("summary"), { textContent: `${writeCount(numUnmatched)} communications could not be joined` }));
      for (const text of unmatched) box.append(Object.assign(document.createElement("p"), { textContent: text }));
      list.append(box);
    }
    if (audit?.passed.length) list.append(told(`${checks(audit.passed)} passed`, audit.passed, "what", !app.model.findings.length));
    if (audit?.unchecked.length) list.append(told(`${checks(audit.unchecked)} could not be made`, audit.unchecked, "why"));
  }

  /** @param {any} finding @param {number} at */
  card(finding, at) {
    const { app } = this;
    const card = document.createElement("article");
    card.className = `finding ${finding.severity}${finding.follows ? " follows" : ""}`;
    card.dataset.finding = String(at);
    const head = document.createElement("h3");
    head.append(Object.assign(document.createElement("span"), { className: "badge", textContent: finding.severity }), ` ${finding.title}`);
    card.append(head);
    const list = document.createElement("dl");
    for (const [name, text] of [["expected", finding.expected], ["found", finding.found], ["do", finding.fix], ["where", placeOf(finding)], ["follows from", causeOf(app.model, finding)]]) {
      if (!text) continue;
      list.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: text }));
    }
    card.append(list);
    const row = document.createElement("div");
    row.className = "places";
    const selection = { kind: "finding", id: at };
    for (const view of app.viewsFor(selection, "findings")) row.append(app.button(`Show in ${view.title.toLowerCase()}`, "", () => app.goTo(selection, view.name)));
    if (row.children.length) card.append(row);
    card.addEventListener("click", (event) => { if (!(event.target instanceof HTMLButtonElement)) app.select(selection); });
    return card;
  }

  draw() {
    if (!this.isFilled) this.fill();
    this.isFilled = true;
    const { selection } = this.app.state;
    for (const card of document.querySelectorAll(".finding")) {
      card.classList.toggle("chosen", selection?.kind === "finding" && /** @type {HTMLElement} */ (card).dataset.finding === String(selection.id));
    }
  }

  /** @param {KeyboardEvent} event */
  key_(event) {
    const { app } = this;
    const count = app.model.findings.length;
    const step = { ArrowDown: 1, n: 1, ArrowUp: -1, p: -1 }[event.key];
    if (!count || (step === undefined && event.key !== "Enter")) return false;
    const at = app.state.selection?.kind === "finding" ? app.state.selection.id : -1;
    if (step === undefined) {
      if (at >= 0) app.goTo({ kind: "finding", id: at }, "graph");
      return at >= 0;
    }
    const next = Math.min(Math.max(at + step, 0), count - 1);
    app.select({ kind: "finding", id: next });
    document.querySelector(`.finding[data-finding="${next}"]`)?.scrollIntoView({ block: "nearest" });
    return true;
  }
}

/** What a finding follows from; "" if from none. @param {import("./model.js").Model} model @param {any} finding */
export function causeOf(model, finding) {
  return finding.follows ? model.findings[finding.follows - 1].title : "";
}

/** Where a finding is: layers, ranks, and how many nodes. @param {any} finding */
export function placeOf(finding) {
  const where = [];
  if (finding.layers.length) where.push(`layers ${writeRuns(toRuns(finding.layers))}`);
  if (finding.ranks.length) where.push(`ranks ${writeRuns(toRuns(finding.ranks))}`);
  if (finding.num_nodes) where.push(`${writeCount(finding.num_nodes)} nodes`);
  return where.join("; ");
}

/** @param {any[]} some */
function checks(some) {
  return `${some.length} check${some.length === 1 ? "" : "s"}`;
}

/** @param {string} title @param {any[]} rows @param {string} column @param {boolean} [isOpen] */
function told(title, rows, column, isOpen = false) {
  const box = Object.assign(document.createElement("details"), { open: isOpen });
  box.append(Object.assign(document.createElement("summary"), { textContent: title }));
  const list = document.createElement("dl");
  for (const check of rows) {
    list.append(Object.assign(document.createElement("dt"), { textContent: check.check }), Object.assign(document.createElement("dd"), { textContent: check[column] }));
  }
  box.append(list);
  return box;
}
