// Keyboard shortcuts of the whole page, and corrections of Gradio's lists.

export function install() {
  if (window.atelierKeys) return;
  window.atelierKeys = true;
  // Only a click may ask whether the end of a run shall be told.
  document.addEventListener("click", (event) => {
    if (
      event.target.closest?.("#start-training") &&
      window.Notification &&
      Notification.permission === "default"
    )
      Notification.requestPermission();
  });
  // Gradio's lists take every key for a wish to see them, so that one which Tab left stayed open over what came next.
  document.addEventListener(
    "keydown",
    (event) => {
      if (event.key === "Tab" && event.target.matches?.("input[role=combobox]"))
        event.stopPropagation();
    },
    true,
  );
  // Enter takes the name that was typed, as leaving the field does; Gradio would take the first one in the list that holds it.
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
  // Alt+1 ... Alt+4 open the tabs.
  document.addEventListener("keydown", (event) => {
    const number = Number(event.code.replace("Digit", ""));
    if (!event.altKey || event.ctrlKey || event.metaKey || !(number >= 1)) return;
    const tab = document.querySelectorAll("#tabs [role=tab]")[number - 1];
    if (tab) {
      event.preventDefault();
      tab.click();
    }
  });
}
