/** Slices that lie beside the page. */

/** @param {import("./app.js").App} app */
export function openSlices(app) {
  app.whyNoSlices = "the slices lie beside this page";
}
