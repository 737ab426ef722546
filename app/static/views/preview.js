// Images with and without the adapter, or a grid of images, which appear one by one.

import { el, pill, notice, button, emptyState, zoomable, compared } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { trigger } = gradio;
  const { drawWith } = connect(gradio);
  drawWith((root, view) => {
    const images = view.pictures || [];
    const head = view.busy
      ? el(
          "div",
          { class: "at-row" },
          pill(view.busy, "busy"),
          button("Stop", () => trigger("stop_drawing")),
        )
      : null;
    if (view.error) {
      root.replaceChildren(notice(view.error, "bad"));
      return;
    }
    if (!images.length) {
      root.replaceChildren(
        view.is_empty
          ? emptyState(
              "No adapter yet",
              "Train one first. Then compare it here with its base, at any strength.",
              button("Go to training", () => trigger("go_train")),
            )
          : emptyState(
              "See what it learned",
              "Compare the adapter with its base: the same prompt and seed, with and without it.",
              view.note ? el("p", {}, view.note) : null,
            ),
      );
      return;
    }
    root.replaceChildren(
      el(
        "section",
        { class: "at-panel", "aria-busy": Boolean(view.busy), "aria-label": "Images" },
        head,
        pair(images) ||
          el(
            "div",
            { class: `at-pictures ${images.length === 2 ? "at-pair" : ""}` },
            images.map((image) =>
              el(
                "figure",
                {},
                image.src
                  ? zoomable(image.src, `${image.title}: ${image.prompt}`)
                  : el("div", { class: "at-placeholder" }),
                el("figcaption", {}, image.title),
              ),
            ),
          ),
        view.elsewhere
          ? el(
              "details",
              {},
              el("summary", {}, "This image in A1111 and ComfyUI"),
              view.elsewhere.map((text) => el("p", { class: "at-hint at-path" }, text)),
            )
          : null,
      ),
    );
  });

  /** Returns both images with a divider, or null until both exist. */
  function pair(images) {
    if (images.length !== 2 || !images.every((image) => image.src)) return null;
    const [before, after] = images.map((image) => ({
      src: image.src,
      alt: `${image.title}: ${image.prompt}`,
      name: image.title,
    }));
    const frame = compared(before, after, "preview");
    frame.classList.add("at-large");
    const save = (image, text) =>
      el("a", { class: "at-button", href: image.src, download: image.src.split("/").pop() }, text);
    return el(
      "div",
      {},
      frame,
      el(
        "div",
        { class: "at-row" },
        save(images[0], "Save left image"),
        save(images[1], "Save right image"),
      ),
    );
  }
}
