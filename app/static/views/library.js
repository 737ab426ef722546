// The Library tab: every run as a card. Runs can be searched, compared, renamed, tagged, deleted and
// restored.

import { el, notice, button, emptyState } from "../lib/dom.js";
import { connect } from "../lib/view.js";
import { createCard } from "./library/card.js";
import { createComparison } from "./library/compare.js";
import { createTools } from "./library/tools.js";

/** With fewer runs the search is not shown. */
const MIN_RUNS_TO_SEARCH = 4;

export function mount(gradio) {
  const { trigger } = gradio;
  const { root, drawWith, ask } = connect(gradio);
  const memory = {
    view: { cards: [] },
    search: "",
    cache: "",
    chosen: [],
    compared: null,
    deleted: null,
    problem: "",
    tools: {},
    typing: null, // the field of a card that has the focus
    waiting: false, // new data arrived while a field had the focus
  };
  const context = { memory, root, ask, trigger, redraw, showProblem };
  const { comparison, choose } = createComparison(context);
  const runCard = createCard(context, choose, createTools(context));

  drawWith((root, view) => {
    const cards = view.cards || [];
    memory.view = { ...view, cards };
    memory.chosen = memory.chosen.filter((run) => cards.some((card) => card.run === run));
    if (memory.typing && root.contains(memory.typing)) memory.waiting = true;
    else redraw();
  });

  /** Stores an error message for the next redraw. */
  function showProblem(text) {
    memory.problem = text;
  }

  function redraw() {
    memory.waiting = false;
    const { cards } = memory.view;
    const grid = el("div", { class: "at-library" });
    const parts = cards.length
      ? [
          undoBar(),
          memory.problem ? notice(memory.problem, "bad") : null,
          searchBox(grid),
          comparison(),
          grid,
          cacheBar(),
        ]
      : [undoBar(), noRuns()];
    root().replaceChildren(...parts.filter(Boolean));
    if (cards.length) fill(grid);
  }

  function noRuns() {
    return emptyState(
      "Nothing trained yet",
      "Each run appears here with its samples, settings and file. Drop a finished LoRA on the page to load its settings.",
      button("Go to training", () => trigger("go_train")),
    );
  }

  function undoBar() {
    if (!memory.deleted) return null;
    const restore = async () => {
      const answer = await ask("restore", { run: memory.deleted.run }, showProblem);
      if (!answer.error) memory.deleted = null;
      redraw();
    };
    return el(
      "p",
      { class: "at-undo", role: "status" },
      `${memory.deleted.name} was deleted.`,
      button("Undo", restore, "at-small"),
    );
  }

  function searchBox(grid) {
    if (memory.view.cards.length < MIN_RUNS_TO_SEARCH && !memory.search) return null;
    const search = el("input", {
      type: "search",
      class: "at-search",
      placeholder: "Search by name, tag, trigger word or base",
      "aria-label": "Search the library",
      oninput: (event) => {
        memory.search = event.target.value;
        fill(grid);
      },
    });
    search.value = memory.search;
    return search;
  }

  /** Shows the cards that contain every searched word. */
  function fill(grid) {
    const words = memory.search.toLowerCase().split(/\s+/);
    const text = (card) =>
      [card.given || card.name, card.trigger, card.base, card.preset, ...(card.tags || [])]
        .join(" ")
        .toLowerCase();
    const matching = memory.view.cards.filter((card) =>
      words.every((word) => text(card).includes(word)),
    );
    const noMatch = el(
      "p",
      { class: "at-hint", role: "status" },
      `No run matches “${memory.search}” by name, tag, trigger word or base.`,
    );
    grid.replaceChildren(...(matching.length ? matching.map(runCard) : [noMatch]));
  }

  function cacheBar() {
    const status = el("span", {}, memory.cache);
    const clear = async () => {
      const answer = await ask("clear_cache", {}, (text) => {
        memory.cache = text;
      });
      if (answer.text) memory.cache = answer.text;
      status.textContent = memory.cache;
    };
    return el(
      "p",
      { class: "at-row at-hint at-caches" },
      `Caches: ${memory.view.cache}. If you clear them, the next start takes longer.`,
      button("Clear caches", clear),
      status,
    );
  }
}
