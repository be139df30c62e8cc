/** The keys. */

const TOLD = [
  ["1 … 6", "the views"], ["/", "search"], ["Esc", "select nothing, close"], ["D", "light or dark"], ["?", "these keys"],
  ["← ↑ → ↓", "go from box to box, rank to rank, cell to cell, along time"], ["Enter", "open or close a box; show a slice in the graph, a piece in time"],
  ["Backspace", "close what a box is in"], ["+ −", "larger, smaller"], ["0", "all of it"], ["T", "heat map or timeline"],
  ["N P", "next, previous: slice, piece, finding"],
];

/** @param {import("./app.js").App} app @param {import("./search.js").Search} search */
export function listenToKeys(app, search) {
  const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("keys"));
  const title = Object.assign(document.createElement("h2"), { textContent: "Keys" });
  const list = document.createElement("dl");
  for (const [key, what] of TOLD) list.append(Object.assign(document.createElement("dt"), { textContent: key }), Object.assign(document.createElement("dd"), { textContent: what }));
  dialog.append(title, list);
  dialog.addEventListener("click", () => dialog.close());
  document.getElementById("help")?.addEventListener("click", () => dialog.showModal());
  document.getElementById("theme")?.addEventListener("click", () => toggleTheme(app));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) {
      if (event.key === "Escape" || event.key === "?") dialog.close();
      return;
    }
    if (event.target instanceof HTMLInputElement && event.target.type !== "checkbox") {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.target instanceof HTMLSelectElement) return;
    const isButton = event.target instanceof HTMLButtonElement;
    if (isButton && (event.key === "Enter" || event.key === " ")) return;
    const views = [...document.querySelectorAll("#tabs button")];
    if (/^[1-9]$/.test(event.key) && views[Number(event.key) - 1]) /** @type {HTMLElement} */ (views[Number(event.key) - 1]).click();
    else if (event.key === "/") search.input.focus();
    else if (event.key === "?") dialog.showModal();
    else if (event.key === "d" || event.key === "D") toggleTheme(app);
    else if (event.key === "Escape") app.select(null);
    else if (!app.views[app.state.view].key_?.(event)) return;
    event.preventDefault();
  });
}

/** @param {import("./app.js").App} app */
function toggleTheme(app) {
  app.change((state) => { state.theme = app.isDark ? "light" : "dark"; });
}
