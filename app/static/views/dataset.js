// The Dataset tab: drop area, issues, tools, and one page of images with captions.

import { el, notice, plural } from "../lib/dom.js";
import { connect } from "../lib/view.js";
import { createCaptions } from "./dataset/captions.js";
import { createGallery } from "./dataset/gallery.js";
import { createImageDialog } from "./dataset/image_dialog.js";
import { createIssues } from "./dataset/issues.js";
import { createTools } from "./dataset/tools.js";
import { createUpload } from "./dataset/upload.js";

const SCAN_INTERVAL = 500; // milliseconds

export function mount(gradio) {
  const { trigger, upload } = gradio;
  const { root, drawWith, keepingFocus, ask } = connect(gradio);
  const memory = {
    name: "",
    turn: 0, // number of the newest request for the view; answers to earlier ones are ignored
    edits: 0, // number of edits; an answer from before the last edit is outdated
    page: 0,
    filter: null,
    view: null,
    messages: [], // from the last import
    working: "",
    panel: "",
    drawn: {},
    open: new Set(),
    timers: new Map(),
    refresh: null,
    trash: null,
    savedFile: "",
  };
  let settings = {};

  // The parts of the tab share this object. Each part may use what the parts above it provide.
  const context = {
    memory,
    root,
    trigger,
    upload,
    ask,
    call,
    load,
    paint,
    changed,
    showError,
    whenQuiet,
    filterBy,
    settings: () => settings,
  };
  const { dropArea, dropListeners, showProgress } = createUpload(context);
  const { importMessages, summary } = Object.assign(context, createIssues(context));
  Object.assign(context, createCaptions(context));
  const { filterBar, pager, imageCard } = createGallery(context, createImageDialog(context));
  const { tools, trashBar, drawJob, follow } = createTools(context);

  drawWith((root, value) => {
    // The settings of the Train tab have not arrived yet.
    if (!value.settings || value.settings.resolution === undefined) return;
    settings = value.settings;
    if (value.name === undefined) {
      if (memory.exists) load();
      return;
    }
    memory.exists = value.exists;
    if (value.name !== memory.name)
      Object.assign(memory, {
        name: value.name,
        page: 0,
        filter: null,
        panel: "",
        open: new Set(),
        followed: "",
      });
    if (value.exists) load();
    else {
      memory.turn++;
      memory.view = { name: value.name, examples: value.examples, cards: [], groups: [], total: 0 };
      paint();
    }
  });

  /** Calls a server function for the open dataset. */
  function call(name, data = {}, onerror = showError) {
    return ask(name, { dataset: memory.name, settings, ...data }, onerror);
  }

  function changed(name) {
    trigger("change_dataset", { name });
  }

  function showError(text) {
    const note = root().querySelector(".at-note");
    if (note) note.replaceChildren(notice(text, "bad"));
  }

  /** Runs `work` after `milliseconds` in which nothing else was requested under the same name. */
  function whenQuiet(name, work, milliseconds) {
    clearTimeout(memory.timers.get(name));
    memory.timers.set(name, setTimeout(work, milliseconds));
  }

  /** Shows only the images that match, or all of them if the filter is null. */
  function filterBy(filter) {
    clearTimeout(memory.timers.get("search"));
    memory.filter = filter;
    memory.page = 0;
    load({ turn: true });
  }

  /** Requests the view and draws it. With `turn` the server does not read the folder again. */
  async function load({ turn = false } = {}) {
    const mine = ++memory.turn;
    const edits = memory.edits;
    const view = await call("view", { page: memory.page, filter: memory.filter, turn });
    if (mine !== memory.turn || view.error) return;
    if (edits !== memory.edits) return load({ turn });
    if (view.scanning) {
      showScan(view);
      setTimeout(() => mine === memory.turn && load(), SCAN_INTERVAL);
      return;
    }
    memory.working = "";
    memory.view = view;
    memory.page = view.page || 0;
    paint();
    if (memory.followed !== memory.name) {
      memory.followed = memory.name;
      follow();
    }
  }

  function showScan(view) {
    const { done, total } = view.scanning;
    showProgress(total ? `Checking ${done} of ${plural(total, "image")}` : "Checking the images");
    if (root().querySelector(".at-dataset")) return;
    memory.view = { ...view, examples: [] };
    paint();
  }

  function paint() {
    const view = memory.view;
    const empty = !view.total && !view.trouble && !view.scanning;
    keepingFocus(() =>
      root().replaceChildren(
        el(
          "div",
          { class: "at-dataset", "data-name": view.name, ...dropListeners(view) },
          dropArea(view, empty),
          el(
            "div",
            { class: "at-note", "aria-live": "polite" },
            view.trouble ? notice(view.trouble, "bad") : null,
          ),
          trashBar(),
          importMessages(),
          summary(view),
          el("div", { class: "at-job-place" }),
          view.total ? tools(view) : null,
          filterBar(view),
          el(
            "div",
            { class: "at-grid" },
            view.cards.map((card) => imageCard(view, card)),
          ),
          pager(view),
        ),
      ),
    );
    drawJob();
  }
}
