/** Pieces of the page that several views have: buttons, choices, panels, scales of colours, rows of tables. */

import { amountColour } from "./palette.js";

/**
 * @param {string} text
 * @param {string} key shown after it, "" none
 * @param {() => void} act
 */
export function makeButton(text, key, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  if (key) button.append(Object.assign(document.createElement("kbd"), { textContent: key }));
  button.addEventListener("click", act);
  return button;
}

/**
 * @param {string} text
 * @param {() => boolean} read
 * @param {(on: boolean) => void} write
 */
export function makeCheckbox(text, read, write) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  box.type = "checkbox";
  label.append(box, ` ${text}`);
  box.addEventListener("change", () => write(box.checked));
  return { element: label, refresh: () => { box.checked = read(); } };
}

/**
 * @param {string} text
 * @param {[string, string][]} options value and what it is called
 * @param {() => string} read
 * @param {(value: string) => void} write
 * @param {Set<string>} [off] values that cannot be chosen: nothing is known of them
 */
export function makeChoice(text, options, read, write, off = new Set()) {
  const label = document.createElement("label");
  const select = document.createElement("select");
  for (const [value, name] of options) {
    const isOff = off.has(value);
    select.append(Object.assign(document.createElement("option"), { value, textContent: isOff ? `${name} (unknown)` : name, disabled: isOff }));
  }
  label.append(`${text} `, select);
  select.addEventListener("change", () => write(select.value));
  return { element: label, refresh: () => { select.value = read(); } };
}

/**
 * @param {HTMLElement} place
 * @param {string} title
 * @param {string} kind
 */
export function makePanel(place, title, kind) {
  const panel = document.createElement("section");
  panel.className = `panel ${kind}`;
  const head = document.createElement("h2");
  head.textContent = title;
  const note = Object.assign(document.createElement("p"), { className: "scale" });
  const body = Object.assign(document.createElement("div"), { className: kind === "list" ? "scroll" : "board" });
  panel.append(head, note, body);
  place.append(panel);
  return { body, note };
}

/**
 * Say what colours mean: a text, and where there are amounts, the colours from the least to the most.
 * @param {HTMLElement} note
 * @param {string} text
 * @param {[string, string] | null} ends the least and the most, as written
 * @param {{ isEstimated?: boolean, after?: string }} [told]
 */
export function tellScale(note, text, ends, { isEstimated = false, after = "" } = {}) {
  const key = JSON.stringify([text, ends, isEstimated, after]);
  if (note.dataset.key === key) return;
  note.dataset.key = key;
  note.replaceChildren(text);
  if (ends) {
    const ramp = Object.assign(document.createElement("i"), { className: isEstimated ? "ramp estimated" : "ramp" });
    ramp.style.setProperty("--ramp", `linear-gradient(90deg, ${[0, 0.2, 0.4, 0.6, 0.8, 1].map(amountColour).join(", ")})`);
    note.append(` · ${ends[0]} `, ramp, ` ${ends[1]}`);
  }
  note.append(after);
}

/**
 * @param {string[]} texts
 * @param {"th" | "td"} kind
 * @param {number} [words] which cell may be broken into lines
 */
export function makeRow(texts, kind, words = -1) {
  const row = document.createElement("tr");
  texts.forEach((text, at) => row.append(Object.assign(document.createElement(kind), { textContent: text, className: at === words ? "words" : "" })));
  return row;
}

/**
 * Let a row be chosen with the mouse and with the keys.
 * @param {HTMLElement} row
 * @param {() => void} choose
 * @param {() => void} [open]
 */
export function makeChoosable(row, choose, open) {
  row.tabIndex = 0;
  row.classList.add("choice");
  row.addEventListener("click", choose);
  row.addEventListener("dblclick", () => open?.());
  row.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.stopPropagation();
      if (event.key === "Enter" && row.classList.contains("chosen") && open) open();
      else choose();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      event.stopPropagation();
      const next = event.key === "ArrowDown" ? row.nextElementSibling : row.previousElementSibling;
      if (next instanceof HTMLElement && next.tabIndex === 0) next.focus();
    }
  });
}
