// A page without a browser: jsdom's globals, and what Gradio passes to a view.

import { register } from "node:module";
import { JSDOM } from "jsdom";

register("./hooks.js", import.meta.url);

const { window } = new JSDOM("<!doctype html><body></body>", {
  pretendToBeVisual: true,
  url: "http://127.0.0.1:7860/",
});
const NAMES = ["window", "document", "Node", "Event", "CustomEvent", "MouseEvent", "KeyboardEvent"];
for (const name of NAMES) Object.assign(globalThis, { [name]: /** @type {any} */ (window)[name] });

/** Waits until the timers and microtasks that are due have run. */
export const settled = () => new Promise((resolve) => setTimeout(resolve, 5));

/** Dispatches a pointer event, which jsdom has no class for. */
export function point(/** @type {EventTarget} */ target, /** @type {string} */ type) {
  target.dispatchEvent(new window.Event(type, { bubbles: true }));
}

/**
 * Returns the argument of `mount`, with functions to send data and to read what the view did.
 * @param {any} value the first data
 * @param {Record<string, (data: any) => any>} server
 */
export function component(value = null, server = {}) {
  const element = document.createElement("div");
  element.innerHTML = '<div class="atelier"></div>';
  document.body.replaceChildren(element);
  /** @type {(() => void)[]} */
  const watchers = [];
  /** @type {[string, any][]} */
  const events = [];
  const props = { value };
  const gradio = {
    element,
    props,
    server,
    constant: [],
    trigger: (/** @type {string} */ name, /** @type {any} */ data) => events.push([name, data]),
    upload: async () => ({ path: "uploaded" }),
    watch: (/** @type {string} */ _name, /** @type {() => void} */ run) => watchers.push(run),
  };
  const root = /** @type {HTMLElement} */ (element.firstChild);
  /** Sends new data, as Python does. */
  const send = async (/** @type {any} */ data) => {
    props.value = data;
    for (const run of watchers) run();
    await settled();
  };
  /** Returns the element with this text. */
  const byText = (/** @type {string} */ text, selector = "button") =>
    /** @type {HTMLElement | undefined} */ (
      [...root.querySelectorAll(selector)].find((node) => node.textContent === text)
    );
  return { gradio, root, send, events, byText };
}
