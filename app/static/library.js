// Every run as a card: searched, tagged, compared, renamed, deleted and brought back.
const memory = { search: "", cache: "", chosen: [], compared: null, deleted: null, problem: "", editing: null, sharing: null };
const FEW = 4;

drawWith((root, view) => {
  const cards = view.cards || [];
  const again = () => drawAll(root, view, again);
  memory.chosen = memory.chosen.filter((run) => cards.some((card) => card.run === run));
  if (memory.typing && root.contains(memory.typing)) { memory.waiting = again; return; }  // not under somebody's hands
  again();
});

function drawAll(root, view, again) {
  const cards = view.cards || [];
  const undo = memory.deleted ? el("p", { class: "at-undo", role: "status" }, `${memory.deleted.name} was deleted.`, button("Undo", async () => {
    const answer = await ask("restore", { run: memory.deleted.run }, (text) => { memory.problem = text; });
    if (!answer.error) memory.deleted = null;
    again();
  }, "at-small")) : null;
  if (!cards.length) {
    root.replaceChildren(...[undo, emptyState("Nothing trained yet", "Every training appears here with its samples, its settings and its file.", button("Go to training", () => trigger("go_train")))].filter(Boolean));
    return;
  }
  const grid = el("div", { class: "at-library" });
  const words = (card) => [card.given || card.name, card.trigger, card.base, card.preset, ...(card.tags || [])].join(" ").toLowerCase();
  const fill = () => grid.replaceChildren(...cards.filter((card) => memory.search.toLowerCase().split(/\s+/).every((word) => words(card).includes(word))).map((card) => cardOf(card, again)));
  const search = cards.length >= FEW || memory.search ? el("input", { type: "search", class: "at-search", placeholder: "Search by name, tag, trigger word or base", "aria-label": "Search the library", oninput: (event) => { memory.search = event.target.value; fill(); } }) : null;
  if (search) search.value = memory.search;
  root.replaceChildren(...[undo, memory.problem ? notice(memory.problem, "bad") : null, search, side(again), grid, cache(view)].filter(Boolean));
  fill();
}

/** Two chosen runs next to each other. */
function side(again) {
  if (memory.chosen.length === 1) return el("p", { class: "at-hint" }, "Choose a second run to compare with.");
  const both = memory.compared;
  if (memory.chosen.length !== 2 || !both) return null;
  const close = () => { memory.chosen = []; memory.compared = null; again(); };
  return el("section", { class: "at-panel at-side", "aria-label": "Comparison" },
    el("div", { class: "at-row" }, el("h3", {}, `${both.runs[0].name} and ${both.runs[1].name}`), el("span", { class: "at-push" }), button("Close", close, "at-small")),
    el("div", { class: "at-pictures at-pair" }, both.runs.map((run) => el("figure", {}, run.sample ? zoomable(run.sample, `${run.name}: ${run.prompt}`) : el("div", { class: "at-placeholder" }, "no sample"), el("figcaption", {}, `${run.name}: ${run.prompt}`)))),
    curves(both.runs),
    el("table", {}, el("thead", {}, el("tr", {}, ["Setting", both.runs[0].name, both.runs[1].name].map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, both.settings.map((field) => el("tr", {}, el("th", { scope: "row" }, field.label), el("td", {}, field.was || "–"), el("td", {}, field.now || "–"))))),
    both.settings.length ? null : el("p", { class: "at-hint" }, "All settings are the same."));
}

function curves(pair) {
  const points = pair.flatMap((run) => run.loss);
  if (!points.length) return null;
  const width = 640, height = 180, most = Math.max(...points.map((point) => point[1])), least = Math.min(...points.map((point) => point[1])), last = Math.max(...points.map((point) => point[0]), 1);
  const place = ([step, loss]) => `${(width * step / last).toFixed(1)},${(8 + (height - 16) * (1 - (loss - least) / (most - least || 1))).toFixed(1)}`;
  return el("figure", { class: "at-curve" }, el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Loss of both runs over ${last} steps, from ${most.toPrecision(2)} to ${least.toPrecision(2)}` },
    pair.map((run, number) => el("polyline", { class: number ? "at-valid" : "at-smooth", points: run.loss.map(place).join(" ") }))),
    el("figcaption", { class: "at-legend" }, pair.map((run, number) => el("span", { class: number ? "at-key-valid" : "at-key-smooth" }, run.name))));
}

async function choose(run, again) {
  memory.chosen = memory.chosen.includes(run) ? memory.chosen.filter((other) => other !== run) : [...memory.chosen, run].slice(-2);
  memory.compared = null;
  if (memory.chosen.length === 2) {
    const [first, second] = memory.chosen;
    const answer = await ask("compare", { first, second }, (text) => { memory.problem = text; });
    if (!answer.error) memory.compared = answer;
  }
  again();
}

function cache(view) {
  const said = el("span", {}, memory.cache);
  const clear = async () => {
    const answer = await ask("clear_cache", {}, (text) => { memory.cache = text; });
    if (answer.text) memory.cache = answer.text;
    said.textContent = memory.cache;
  };
  return el("p", { class: "at-row at-hint" }, `Caches: ${view.cache}. Clearing them costs nothing but time at the next start.`, button("Clear caches", clear), said);
}

function cardOf(card, again) {
  const problem = el("p", { class: "at-notice at-bad", role: "alert" });
  const complain = (text) => { problem.textContent = text; };
  const act = (action) => ask("act", { run: card.run, action }, complain);
  const name = card.given || card.name;
  const remove = async () => {
    const answer = await ask("delete", { run: card.run }, complain);
    if (!answer.error) { memory.deleted = { run: card.run, name }; again(); }
  };
  const fact = (label, value) => value ? el("span", {}, el("b", {}, value), ` ${label}`) : null;
  return el("article", { class: "at-run", "aria-label": name },
    card.sample ? zoomable(card.sample, `Sample of ${name}: ${card.prompt}`) : el("div", { class: "at-placeholder" }, "no sample"),
    el("div", { class: "at-run-text" },
      el("div", { class: "at-row" }, el("h3", {}, name), pill(card.label, card.tone), (card.tags || []).map((tag) => el("span", { class: "at-tag" }, tag))),
      el("p", { class: "at-hint" }, [card.preset, card.base.split(/[\\/]/).pop(), card.steps, card.best ? `best at step ${card.best}` : "", card.file ? card.file.size : ""].filter(Boolean).join(" · ")),
      card.file ? el("p", { class: "at-hint at-facts" }, fact("trigger", card.trigger), fact("strength", "0.8 to 1")) : null,
      el("p", { class: "at-hint" }, card.date),
      card.fault ? notice(card.fault, "bad") : null, card.report ? el("a", { href: card.report, download: "report.txt" }, "Report") : null, problem,
      el("div", { class: "at-row at-actions" },
        card.file ? el("a", { class: "at-button at-primary", href: card.file.href, download: card.file.name }, "Download") : null,
        card.can_preview ? button("Preview", () => trigger("open_preview", { run: card.run })) : null,
        card.actions.includes("resume") ? button(card.label === "Not started" ? "Start" : "Resume", () => { act("resume"); trigger("go_train"); }) : null,
        card.settings ? button("Train again", () => trigger("train_again", { run: card.run })) : null,
        el("button", { type: "button", class: "at-button", "aria-pressed": String(memory.chosen.includes(card.run)), onclick: () => choose(card.run, again) }, "Compare"),
        card.actions.includes("delete") ? button("Delete", remove, "at-danger") : null),
      more(card, name, complain)));
}

/** Name, tags, card and Hub: what one needs seldom. */
function more(card, name, complain) {
  const hold = { onfocus: (event) => { memory.typing = event.target; }, onblur: () => { memory.typing = null; if (memory.waiting) { setTimeout(() => { if (!memory.typing) { memory.waiting(); memory.waiting = null; } }, 300); } } };
  const named = el("input", { type: "text", value: name, "aria-label": `Name of ${name}`, maxlength: 80, ...hold });
  const tags = el("input", { type: "text", value: (card.tags || []).join(", "), "aria-label": `Tags of ${name}`, placeholder: "tags, separated by commas", ...hold });
  const keep = () => ask("describe", { run: card.run, name: named.value, tags: tags.value.split(",") }, complain);
  const saveCard = async () => {
    const answer = await ask("model_card", { run: card.run }, complain);
    if (answer.text) saveText("README.md", answer.text);
  };
  const repository = el("input", { type: "text", placeholder: "user/name", "aria-label": "Repository on the Hugging Face Hub", ...hold });
  const push = async () => {
    if (!confirm(`Upload the adapter, its card and its last samples to ${repository.value} on the Hugging Face Hub, as a private repository?`)) return;
    complain("");
    said.textContent = "Uploading…";
    const answer = await ask("push", { run: card.run, repository: repository.value, private: true }, complain);
    said.textContent = answer.address ? `Uploaded: ${answer.address}` : "";
  };
  const said = el("span", { class: "at-hint", role: "status" });
  const open = memory.opened === card.run;
  return el("details", { open, ontoggle: (event) => { if (event.target.open) memory.opened = card.run; else if (memory.opened === card.run) memory.opened = null; } }, el("summary", {}, "More"),
    el("div", { class: "at-row at-edit" }, named, tags, button("Keep", keep, "at-small")),
    card.file ? el("div", { class: "at-row at-edit" }, button("Model card", saveCard, "at-small"), repository, button("Push to the Hub", push, "at-small"), said) : null,
    el("p", { class: "at-hint at-path" }, card.folder), card.settings ? el("pre", { tabindex: 0, "aria-label": `Settings of ${name}` }, card.settings) : null);
}
