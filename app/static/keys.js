() => {
  if (window.atelierKeys) return;
  window.atelierKeys = true;
  // Alt+1 ... Alt+4 open the tabs.
  document.addEventListener("keydown", (event) => {
    const number = Number(event.code.replace("Digit", ""));
    if (!event.altKey || event.ctrlKey || event.metaKey || !(number >= 1)) return;
    const tab = document.querySelectorAll("#tabs [role=tab]")[number - 1];
    if (tab) { event.preventDefault(); tab.click(); }
  });
}
