// Keyboard shortcuts of the page, and corrections of Gradio's dropdowns.

import { SELECTORS } from "./gradio.js";

export function install() {
  if (window.atelierKeys) return;
  window.atelierKeys = true;
  // Browsers allow the request to show notifications only after a click.
  document.addEventListener("click", (event) => {
    if (
      event.target.closest?.("#start-training") &&
      window.Notification &&
      Notification.permission === "default"
    )
      Notification.requestPermission();
  });
  // A dropdown of Gradio opens its list on every key. On Tab the list would stay open over the next field.
  document.addEventListener(
    "keydown",
    (event) => {
      if (event.key === "Tab" && event.target.matches?.(SELECTORS.listInput))
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
      if (!event.target.matches?.("#dataset input")) return;
      if (event.key === "Enter" && !arrow) {
        event.stopPropagation();
        event.target.blur();
      }
      arrow = event.key.startsWith("Arrow");
    },
    true,
  );
  // Alt+1 to Alt+4 open the tabs.
  document.addEventListener("keydown", (event) => {
    const number = Number(event.code.replace("Digit", ""));
    if (!event.altKey || event.ctrlKey || event.metaKey || !(number >= 1)) return;
    const tab = document.querySelectorAll(SELECTORS.tab)[number - 1];
    if (tab) {
      event.preventDefault();
      tab.click();
    }
  });
}
