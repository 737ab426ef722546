// Every run as a card.
const memory = { search: "", cache: "" };
const MANY = 12;

drawWith((root, view) => {
  const cards = view.cards || [];
  if (!cards.length) {
    root.replaceChildren(emptyState("Nothing trained yet", "Every training appears here with its samples, its settings and its file.", button("Go to training", () => trigger("go_train"))));
    return;
  }
  const grid = el("div", { class: "at-library" });
  const fill = () => grid.replaceChildren(...cards.filter((card) => card.name.toLowerCase().includes(memory.search.toLowerCase())).map(cardOf));
  const search = cards.length > MANY ? el("input", { type: "search", class: "at-search", placeholder: "Search by name", "aria-label": "Search by name", oninput: (event) => { memory.search = event.target.value; fill(); } }) : null;
  if (search) search.value = memory.search; else memory.search = "";
  root.replaceChildren(...[search, grid, cache(view)].filter(Boolean));
  fill();
});

function cache(view) {
  const said = el("span", {}, memory.cache);
  const clear = async () => {
    const answer = await ask("clear_cache", {}, (text) => { memory.cache = text; });
    if (answer.text) memory.cache = answer.text;
    said.textContent = memory.cache;
  };
  return el("p", { class: "at-row at-hint" }, `Caches: ${view.cache}. Clearing them costs nothing but time at the next start.`, button("Clear caches", clear), said);
}

function cardOf(card) {
  const problem = el("p", { class: "at-notice at-bad", role: "alert" });
  const act = (action) => ask("act", { run: card.run, action }, (text) => { problem.textContent = text; });
  const remove = () => { if (confirm(`Delete ${card.name} with its saves and samples? This cannot be undone.`)) act("delete"); };
  return el("article", { class: "at-run", "aria-label": card.name },
    card.sample ? zoomable(card.sample, `Sample of ${card.name}: ${card.prompt}`) : el("div", { class: "at-placeholder" }, "no sample"),
    el("div", { class: "at-run-text" },
      el("div", { class: "at-row" }, el("h3", {}, card.name), pill(card.label, card.tone)),
      el("p", { class: "at-hint" }, [card.preset, card.steps, card.best ? `best at step ${card.best}` : "", card.file ? card.file.size : ""].filter(Boolean).join(" · ")),
      el("p", { class: "at-hint" }, card.date),
      card.fault ? notice(card.fault, "bad") : null, card.report ? el("a", { href: card.report, download: "report.txt" }, "Report") : null, problem,
      el("div", { class: "at-row at-actions" },
        card.file ? el("a", { class: "at-button at-primary", href: card.file.href, download: card.file.name }, "Download") : null,
        card.can_preview ? button("Preview", () => trigger("open_preview", { run: card.run })) : null,
        card.actions.includes("resume") ? button(card.label === "Not started" ? "Start" : "Resume", () => { act("resume"); trigger("go_train"); }) : null,
        card.settings ? button("Train again", () => trigger("train_again", { run: card.run })) : null,
        card.actions.includes("delete") ? button("Delete", remove, "at-danger") : null),
      el("details", {}, el("summary", {}, "Settings"), el("p", { class: "at-hint at-path" }, card.folder), el("pre", { tabindex: 0 }, card.settings))));
}
