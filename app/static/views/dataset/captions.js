// Caption boxes that save themselves, in the gallery and in the image dialog.

import { el, plural } from "../../lib/dom.js";
import { SELECTORS } from "../../gradio.js";

const MAX_IMAGES_TO_RECHECK = 500;

/** Calls a server function by a request that outlives the page, which the requests of Gradio do not. */
function sendAfterLeaving(name, data) {
  const view = window[SELECTORS.pageConfig].components.find(
    (each) => each.props.elem_id === "dataset-view",
  );
  fetch(SELECTORS.viewCallRoute, {
    method: "POST",
    keepalive: true,
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ data, component_id: view.id, fn_name: name, session_hash: "leaving" }),
  }).catch(() => {});
}

/**
 * Sends unsaved captions when the page is hidden or left.
 * The browser then asks whether to leave, which gives the request time to arrive.
 */
function sendUnsavedOnLeaving() {
  const unsaved = () => {
    /** @type {NodeListOf<HTMLElement & {unsaved?: boolean, send?: () => void}>} */
    const nodes = document.querySelectorAll(".atelier textarea, .at-paint");
    return [...nodes].filter((node) => node.unsaved);
  };
  window.addEventListener("beforeunload", (event) => {
    if (unsaved().length) event.preventDefault();
  });
  for (const type of ["visibilitychange", "beforeunload"])
    window.addEventListener(type, () => {
      for (const node of unsaved()) node.send?.();
    });
}

export function createCaptions(context) {
  const { memory, root, call, load, whenQuiet, setUndo } = context;
  sendUnsavedOnLeaving();

  /** Returns the caption box of a card with its state and its token count. */
  function captionBox(view, card, extra = {}) {
    const saved = el(
      "span",
      { class: "at-saved", role: "status" },
      memory.savedFile === card.file ? "saved" : "",
    );
    const tokens = el("span", { class: "at-tokens" });
    const count = () => {
      tokens.textContent =
        card.tokens > view.limit
          ? `${card.tokens} of ${view.limit} tokens`
          : plural(card.tokens, "token");
      tokens.classList.toggle("at-long", card.tokens > view.limit);
    };
    const box = el("textarea", {
      rows: 3,
      "aria-label": `Caption of ${card.file}`,
      placeholder: "Describe the image",
      spellcheck: "true",
      oninput: () => {
        box.unsaved = true;
        saved.textContent = "…";
        whenQuiet(card.file, save, 700);
      },
      onblur: () => save(),
      ...extra,
    });
    box.value = card.caption;
    box.edited = () => box.value !== card.caption;
    box.send = () =>
      sendAfterLeaving("save_caption", {
        dataset: view.name,
        settings: context.settings(),
        file: card.file,
        caption: box.value,
      });
    const save = async () => {
      clearTimeout(memory.timers.get(card.file));
      const text = box.value;
      if (text === card.caption) {
        box.unsaved = false;
        if (saved.textContent === "…") saved.textContent = "saved";
        return;
      }
      const answer = await call("save_caption", { file: card.file, caption: text }, () => {
        saved.replaceChildren(
          el("button", { type: "button", class: "at-retry", onclick: save }, "not saved – retry"),
        );
      });
      if (answer.error) return;
      if (!card.caption.trim() !== !text.trim()) memory.view.bare += text.trim() ? -1 : 1;
      card.caption = text;
      card.tokens = answer.tokens;
      box.unsaved = box.value !== text;
      memory.savedFile = card.file;
      count();
      saved.textContent = box.value === text ? "saved" : "…";
      setUndo(answer.undo);
      // The tab was redrawn during the request, perhaps with the previous caption.
      if (!box.isConnected) load({ turn: true });
      refreshLater();
    };
    count();
    return { box, saved, tokens, save };
  }

  /** Checks the dataset again after an edit, if it is small enough for that to be cheap. */
  function refreshLater() {
    clearTimeout(memory.refresh);
    if (memory.view.total > MAX_IMAGES_TO_RECHECK) return;
    memory.refresh = setTimeout(async () => {
      const turn = memory.turn,
        edits = memory.edits;
      const view = await call("view", { page: memory.page, filter: memory.filter }, () => {});
      if (view.error || view.scanning || turn !== memory.turn) return;
      if (edits !== memory.edits) return refreshLater();
      Object.assign(memory.view, {
        groups: view.groups,
        verdict: view.verdict,
        bare: view.bare,
        tags: view.tags,
        undo: view.undo,
      });
      root().querySelector(".at-summary").replaceWith(context.summary(memory.view));
    }, 2000);
  }

  return { captionBox };
}
