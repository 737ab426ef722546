// Labelled inputs of the tool panels.

import { el } from "../../lib/dom.js";

/** Returns a label with a text box, and the box. */
export function field(label, attributes = {}) {
  const input = el("input", { type: "text", ...attributes });
  return [el("label", {}, el("span", {}, label), input), input];
}

/** Returns a label with a checkbox, and the checkbox. */
export function checkbox(label, attributes = {}) {
  const input = el("input", { type: "checkbox", ...attributes });
  return [el("label", { class: "at-tick" }, input, el("span", {}, label)), input];
}
