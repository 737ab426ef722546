// Elements and small components that the views share.

/**
 * Returns a new element. Text is only ever set as text nodes.
 * Attributes that begin with "on" are listeners. Attributes and children that are null, undefined or
 * false are left out.
 * @param {string} tag
 * @param {Record<string, any>} attributes
 * @param {...any} children
 * @returns {any}
 */
export function el(tag, attributes = {}, ...children) {
  const space = ["svg", "path", "line", "text", "circle", "polyline", "g", "title"].includes(tag)
    ? "http://www.w3.org/2000/svg"
    : null;
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return node;
}

/** @typedef {"quiet" | "good" | "warn" | "bad" | "busy"} Tone the colour of a pill or a notice */

/**
 * Returns a short label on a coloured background.
 * @param {string | number} text
 * @param {Tone} [tone]
 * @returns {HTMLElement}
 */
export const pill = (text, tone = "quiet") => el("span", { class: `at-pill at-${tone}` }, text);

/**
 * Returns a message. Screen readers announce an error at once.
 * @param {string} text
 * @param {Tone} tone
 * @returns {HTMLElement}
 */
export const notice = (text, tone) =>
  el("p", { class: `at-notice at-${tone}`, role: tone === "bad" ? "alert" : "status" }, text);

/**
 * Returns a button. `look` contains further classes, such as "at-small at-danger".
 * @param {string} text
 * @param {(event: MouseEvent) => void} onclick
 * @param {string} [look]
 * @returns {HTMLButtonElement}
 */
export const button = (text, onclick, look = "") =>
  el("button", { type: "button", class: `at-button ${look}`, onclick }, text);

/**
 * Returns what a view shows before it has anything to show.
 * @param {string} title
 * @param {string} text
 * @param {...any} more
 * @returns {HTMLElement}
 */
export const emptyState = (title, text, ...more) =>
  el("div", { class: "at-empty" }, el("strong", {}, title), el("p", {}, text), ...more);

/**
 * Returns an image that opens large on click. Escape closes it.
 * @param {string} src
 * @param {string} alt
 * @param {Record<string, any>} [attributes]
 * @returns {HTMLButtonElement}
 */
export function zoomable(src, alt, attributes = {}) {
  const open = () => {
    const dialog = el(
      "dialog",
      { class: "at-lightbox", onclick: () => dialog.close(), onclose: () => dialog.remove() },
      el("img", { src, alt }),
      el("p", {}, alt),
      el("button", { type: "button", class: "at-button", autofocus: true }, "Close"),
    );
    document.body.append(dialog);
    dialog.showModal();
  };
  return el(
    "button",
    { type: "button", class: "at-zoom", "aria-label": `Enlarge: ${alt}`, onclick: open },
    el("img", { src, alt, ...attributes }),
  );
}

/**
 * Positions of the dividers in percent by key, so that they survive redrawing.
 * @type {Record<string, number>}
 */
const dividers = {};

/** @typedef {{src: string, alt: string, name: string}} NamedImage an image with its label */

/**
 * Returns two images on top of each other with a divider. Its position is remembered under `key`.
 * @param {NamedImage} before
 * @param {NamedImage} after
 * @param {string} key
 * @returns {HTMLElement}
 */
export function compared(before, after, key) {
  const over = el("img", { src: after.src, alt: after.alt, class: "at-after" });
  const frame = el(
    "div",
    { class: "at-compare" },
    el("img", { src: before.src, alt: before.alt }),
    over,
    el("div", { class: "at-divider", "aria-hidden": "true" }),
    el("span", { class: "at-left", "aria-hidden": "true" }, before.name),
    el("span", { class: "at-right", "aria-hidden": "true" }, after.name),
  );
  const slider = el("input", {
    type: "range",
    min: 0,
    max: 100,
    step: 1,
    "aria-label": `Divider between ${before.name} and ${after.name}`,
    oninput: () => move(Number(slider.value)),
  });
  const move = (/** @type {number} */ percent) => {
    dividers[key] = percent;
    frame.style.setProperty("--at-at", `${percent}%`);
  };
  slider.value = dividers[key] ?? 50;
  move(Number(slider.value));
  frame.append(slider);
  return frame;
}

/**
 * Returns the dropped entries and files. The browser empties the event after its listeners.
 * @param {DataTransfer} transfer
 * @returns {{entries: FileSystemEntry[], files: File[]}}
 */
export const carried = ({ items, files }) => ({
  entries: [...items].flatMap((item) => item.webkitGetAsEntry?.() ?? []),
  files: [...files],
});

/**
 * Lets the browser save a text as a file.
 * @param {string} name
 * @param {string} text
 */
export function saveText(name, text) {
  const link = el("a", {
    href: URL.createObjectURL(new Blob([text], { type: "text/plain" })),
    download: name,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/**
 * Returns the count with its noun: "1 image", "2 images".
 * @param {number} count
 * @param {string} word
 */
export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/**
 * Returns a drawing of a fixed size that scales with its place, with a description for screen readers.
 * @param {number} width
 * @param {number} height
 * @param {string} label
 * @param {...any} shapes
 */
export const plot = (width, height, label, ...shapes) =>
  el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...shapes);
