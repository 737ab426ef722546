// Keyboard shortcuts of the page, and corrections of Gradio's dropdowns.

import { SELECTORS } from "./gradio.js";

let isInstalled = false;

/** Returns the element that an event is about, or null for the document itself. */
const element = (/** @type {Event} */ { target }) =>
  target instanceof Element ? /** @type {HTMLElement} */ (target) : null;

/** Adds the listeners once. */
export function install() {
  if (isInstalled) return;
  isInstalled = true;
  // Browsers allow the request to show notifications only after a click.
  document.addEventListener("click", (event) => {
    if (
      element(event)?.closest("#start-training") &&
      window.Notification &&
      Notification.permission === "default"
    )
      Notification.requestPermission();
  });
  // A dropdown of Gradio opens its list on every key. On Tab the list would stay open over the next field.
  document.addEventListener(
    "keydown",
    (event) => {
      if (event.key === "Tab" && element(event)?.matches(SELECTORS.listInput))
        event.stopPropagation();
    },
    true,
  );
  // Enter accepts the typed name, as leaving the field does. Gradio would select the first name in the
  // list that contains it.
  let arrow = false;
  document.addEventListener(
    "keydown",
    (event) => {
      if (!element(event)?.matches("#dataset input")) return;
      if (event.key === "Enter" && !arrow) {
        event.stopPropagation();
        element(event)?.blur();
      }
      arrow = event.key.startsWith("Arrow");
    },
    true,
  );
  // Alt+1 to Alt+4 open the tabs.
  document.addEventListener("keydown", (event) => {
    const number = Number(event.code.replace("Digit", ""));
    if (!event.altKey || event.ctrlKey || event.metaKey || !(number >= 1)) return;
    /** @type {NodeListOf<HTMLElement>} */
    const tabs = document.querySelectorAll(SELECTORS.tab);
    const tab = tabs[number - 1];
    if (tab) {
      event.preventDefault();
      tab.click();
    }
  });
}
