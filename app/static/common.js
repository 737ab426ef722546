// Helpers in front of every view's script. Text is only ever set as text nodes.
// Provided by Gradio: element, props, trigger, server, upload, watch.

const root = () => element.querySelector(".atelier");

/** An element: attributes as an object (on... are listeners, null and false are left out), then children or text. */
function el(tag, attributes = {}, ...children) {
  const space = ["svg", "path", "line", "text", "circle", "polyline", "g", "title"].includes(tag) ? "http://www.w3.org/2000/svg" : null;
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Draws whenever Python sends other data; before the first of it, nothing. A press waits for its end: with the button under it, it would be lost. */
function drawWith(draw) {
  let isPressed = false, isDue = false;
  const again = () => {
    isDue = isPressed;
    if (!isPressed && root() && props.value) keepingPlace(() => draw(root(), props.value));
  };
  const released = () => setTimeout(() => { isPressed = false; if (isDue) again(); });  // after the click that follows
  element.addEventListener("pointerdown", () => { isPressed = true; });
  for (const end of ["pointerup", "pointercancel", "dragend"]) window.addEventListener(end, released);
  queueMicrotask(again);  // when the whole script has run: what it declares further below is not there before
  watch("value", again);
}

/** Draws without throwing a person out: the control that the keyboard was on has it again, with what was being typed there.
    A box whose typing is not taken note of elsewhere says so by a function `edited`. */
function keepingPlace(draw) {
  const before = document.activeElement;
  if (!root().contains(before)) return draw();
  const name = nameOf(before), { value, selectionStart, selectionEnd } = before, edited = before.edited && before.edited();
  draw();
  if (root().contains(document.activeElement)) return;
  const after = before.isConnected ? before : [...root().querySelectorAll("button, a, input, select, summary, textarea")].find((node) => nameOf(node) === name);
  if (!after) return;
  if (edited && after.value !== value) { after.value = value; after.dispatchEvent(new Event("input")); }
  after.focus({ preventScroll: true });
  if (Number.isInteger(selectionStart)) after.setSelectionRange(selectionStart, selectionEnd);  // buttons and numbers have none
}

const nameOf = (node) => node.id || `${node.tagName} ${node.getAttribute("aria-label") || node.textContent}`;
const pill = (text, tone = "quiet") => el("span", { class: `at-pill at-${tone}` }, text);
const notice = (text, tone) => el("p", { class: `at-notice at-${tone}`, role: tone === "bad" ? "alert" : "status" }, text);
const button = (text, onclick, look = "") => el("button", { type: "button", class: `at-button ${look}`, onclick }, text);
const emptyState = (title, text, ...more) => el("div", { class: "at-empty" }, el("strong", {}, title), el("p", {}, text), ...more);

/** Calls a server function; a sentence in `error` and a lost connection both end in `onerror`. */
async function ask(name, data, onerror) {
  let answer;
  try {
    answer = await server[name](data);
  } catch {
    answer = { error: "The page's server did not answer. Check that it still runs, then try again." };
  }
  if (answer && answer.error) onerror(answer.error);
  return answer;
}

/** A picture that opens large on click; Escape closes it. */
function zoomable(src, alt, attributes = {}) {
  const open = () => {
    const dialog = el("dialog", { class: "at-lightbox", onclick: () => dialog.close(), onclose: () => dialog.remove() },
      el("img", { src, alt }), el("p", {}, alt), el("button", { type: "button", class: "at-button", autofocus: true }, "Close"));
    document.body.append(dialog);
    dialog.showModal();
  };
  return el("button", { type: "button", class: "at-zoom", "aria-label": `Enlarge: ${alt}`, onclick: open }, el("img", { src, alt, ...attributes }));
}

/** Two pictures over each other with a divider to move; the place of the divider is kept under `key`. */
const dividers = {};
function compared(before, after, key) {
  const over = el("img", { src: after.src, alt: after.alt, class: "at-after" });
  const frame = el("div", { class: "at-compare" }, el("img", { src: before.src, alt: before.alt }), over, el("div", { class: "at-divider", "aria-hidden": "true" }),
    el("span", { class: "at-left", "aria-hidden": "true" }, before.name), el("span", { class: "at-right", "aria-hidden": "true" }, after.name));
  const slider = el("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": `Divider between ${before.name} and ${after.name}`, oninput: () => move(slider.value) });
  const move = (percent) => { dividers[key] = percent; frame.style.setProperty("--at-at", `${percent}%`); };
  slider.value = dividers[key] ?? 50;
  move(slider.value);
  frame.append(slider);
  return frame;
}

/** What a drag carries, to be used later: the browser empties the drag itself when its event is over. */
const carried = ({ items, files }) => ({ entries: [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean), files: [...files] });

/** Lets the browser save a text as a file. */
function saveText(name, text) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "text/plain" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
