// One page of images with their captions, the search above and the page buttons below.

import { el, button } from "../../lib/dom.js";

/** Smaller datasets fit the window, so they need no search. */
const MIN_IMAGES_TO_SEARCH = 13;

/** Returns a frame around the trained part of a square thumbnail, or null if all of it is trained. */
function cropOverlay(card) {
  const [left, top, right, bottom] = card.box;
  if (right - left > 0.995 && bottom - top > 0.995) return null;
  const width = Math.min(1, card.ratio),
    height = Math.min(1, 1 / card.ratio);
  const at = (x, y, w, h) =>
    `left:${100 * x}%;top:${100 * y}%;width:${100 * w}%;height:${100 * h}%`;
  return el(
    "span",
    { class: "at-area", style: at((1 - width) / 2, (1 - height) / 2, width, height) },
    el("span", { class: "at-crop", style: at(left, top, right - left, bottom - top) }),
  );
}

export function createGallery(context, openImage) {
  const { memory, root, call, load, whenQuiet, filterBy, captionBox } = context;

  function filterBar(view) {
    if (!view.total) return null;
    const text = memory.filter
      ? memory.filter.title || (memory.filter.tag && `tag “${memory.filter.tag}”`)
      : "";
    const find = () =>
      whenQuiet("search", () => filterBy(search.value ? { text: search.value } : null), 300);
    const search = el("input", {
      type: "search",
      class: "at-search",
      placeholder: "Search names and captions",
      "aria-label": "Search names and captions",
      value: (memory.filter && memory.filter.text) || "",
      oninput: find,
    });
    search.edited = () => true;
    return el(
      "div",
      { class: "at-row at-filter" },
      view.total >= MIN_IMAGES_TO_SEARCH || memory.filter ? search : null,
      text ? el("span", { class: "at-pill at-quiet" }, text) : null,
      memory.filter ? el("span", { class: "at-hint" }, `${view.matching} of ${view.total}`) : null,
      memory.filter ? button("Show all", () => filterBy(null), "at-small") : null,
    );
  }

  function pager(view) {
    if (!(view.pages > 1)) return null;
    const go = (page) => {
      memory.page = page;
      load({ turn: true }).then(() => root().querySelector(".at-filter").scrollIntoView());
    };
    return el(
      "nav",
      { class: "at-row at-pager", "aria-label": "Pages" },
      button("← Previous", () => go(view.page - 1), view.page ? "" : "at-off"),
      el("span", {}, `Page ${view.page + 1} of ${view.pages}`),
      button("Next →", () => go(view.page + 1), view.page + 1 < view.pages ? "" : "at-off"),
    );
  }

  function imageCard(view, card) {
    const move = (event, step) => {
      event.preventDefault();
      const all = [...root().querySelectorAll(".at-card textarea")],
        next = all[all.indexOf(event.target) + step];
      if (next) next.focus();
      else if (view.pages > 1) {
        memory.page = (view.page + step + view.pages) % view.pages;
        load({ turn: true }).then(() =>
          [...root().querySelectorAll(".at-card textarea")].at(step > 0 ? 0 : -1).focus(),
        );
      } else (step > 0 ? all[0] : all.at(-1)).focus();
    };
    const { box, saved, tokens } = captionBox(view, card, {
      onkeydown: (event) => {
        if ((event.key === "Enter" && event.ctrlKey) || (event.key === "ArrowDown" && event.altKey))
          move(event, 1);
        if (event.key === "ArrowUp" && event.altKey) move(event, -1);
      },
    });
    const remove = async () => {
      const answer = await call("remove_picture", { file: card.file });
      if (!answer.error) load();
    };
    return el(
      "figure",
      { class: "at-card", "data-file": card.file },
      el(
        "div",
        { class: "at-picture" },
        el(
          "button",
          {
            type: "button",
            class: "at-open",
            "aria-label": `Crop and mask of ${card.file}`,
            title: "Crop and mask",
            onclick: () => openImage(view, card),
          },
          el("img", { src: card.src, alt: card.caption || card.file, loading: "lazy" }),
          cropOverlay(card),
        ),
        card.mask ? el("span", { class: "at-badge" }, "mask") : null,
        card.repeats > 1 ? el("span", { class: "at-badge at-right" }, `× ${card.repeats}`) : null,
        el(
          "button",
          {
            type: "button",
            class: "at-remove",
            title: "Remove from the dataset",
            "aria-label": `Remove ${card.file}`,
            onclick: remove,
          },
          "✕",
        ),
      ),
      box,
      el(
        "figcaption",
        {},
        el("span", { class: "at-file", title: `${card.file}, ${card.size}` }, card.file),
        tokens,
        saved,
      ),
    );
  }

  return { filterBar, pager, imageCard };
}
