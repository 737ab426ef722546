// Samples of the run. Each prompt shows the selected sample beside the base, and all its samples below.

import { el, zoomable, compared } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { drawWith } = connect(gradio);
  const memory = {}; // selected step by prompt and seed
  drawWith((root, view) => {
    const rows = view.rows || [];
    if (!rows.length) {
      root.replaceChildren();
      return;
    }
    const again = () =>
      root.replaceChildren(
        el(
          "section",
          { class: "at-panel", "aria-label": "Samples" },
          el("h3", {}, "Samples"),
          rows.map((row) => rowOf(row, view.best, again)),
          view.without
            ? rowOf(
                view.without,
                view.best,
                again,
                "The first prompt without its trigger word. It should look like the base. A leak of 100 % means that it changes as much as with the trigger word. ",
              )
            : null,
          likeness(view),
        ),
      );
    again();
  });

  /** Returns a bar for each save: the similarity of its samples to the nearest training image. */
  function likeness(view) {
    const likenesses = view.likeness || [];
    if (likenesses.length < 2 || view.between === null) return null;
    const width = 640,
      height = 150,
      low = 126,
      wide = (width - 10) / likenesses.length,
      y = (value) => low - 112 * Math.max(0, Math.min(1, value));
    const label = `Similarity of the samples to the nearest training image: ${likenesses.map(([step, value]) => `${value.toFixed(2)} at step ${step}`).join(", ")}; between training images ${view.between.toFixed(2)}`;
    return el(
      "figure",
      { class: "at-curve at-likeness" },
      el(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
        likenesses.map(([step, value], index) =>
          el(
            "g",
            {},
            el(
              "line",
              {
                class: step && value > view.between ? "at-near" : "at-far",
                x1: 5 + wide * (index + 0.5),
                x2: 5 + wide * (index + 0.5),
                y1: low,
                y2: Math.min(low - 1, y(value)),
                "stroke-width": Math.min(44, 0.6 * wide),
              },
              el("title", {}, value.toFixed(2)),
            ),
            el(
              "text",
              { x: 5 + wide * (index + 0.5), y: height - 6, "text-anchor": "middle" },
              step ? String(step) : "base",
            ),
          ),
        ),
        el("line", {
          class: "at-between",
          x1: 0,
          x2: width,
          y1: y(view.between),
          y2: y(view.between),
        }),
      ),
      el(
        "figcaption",
        { class: "at-hint" },
        "Similarity of the samples to the nearest training image, in colour and layout. Bars above the line are more similar than training images are to each other: the adapter copies them (overfitting).",
      ),
    );
  }

  function rowOf(row, best, again, hint = "") {
    const key = `${row.prompt} ${row.seed}`;
    const nameOfStep = ({ step }) => {
      if (step === 0) return "Base";
      return step === best ? `★ Step ${step}` : `Step ${step}`;
    };
    const alt = (image) => `${nameOfStep(image)}: ${row.prompt}`;
    const [base, ...later] = row.pictures;
    const chosen = later.find((image) => image.step === memory[key]) || later[later.length - 1];
    const thumbnail = (image) =>
      el(
        "button",
        {
          type: "button",
          class: "at-zoom",
          "aria-label": `Show ${alt(image)}`,
          "aria-pressed": String(image === chosen),
          onclick: () => {
            memory[key] = image.step;
            again();
          },
        },
        el("img", { src: image.src, alt: alt(image) }),
      );
    return el(
      "div",
      { class: "at-samples" },
      el(
        "p",
        { class: "at-prompt" },
        hint ? el("span", { class: "at-hint" }, hint) : null,
        row.prompt,
        el("span", { class: "at-hint" }, ` seed ${row.seed}`),
      ),
      chosen && base.step === 0
        ? compared(
            { src: base.src, alt: alt(base), name: "Base" },
            { src: chosen.src, alt: alt(chosen), name: nameOfStep(chosen) },
            key,
          )
        : null,
      el(
        "div",
        { class: "at-strip" },
        row.pictures.map((image) =>
          el(
            "figure",
            { class: image.step === best ? "at-best" : "" },
            image.step === 0 || !chosen ? zoomable(image.src, alt(image)) : thumbnail(image),
            el(
              "figcaption",
              {},
              nameOfStep(image),
              image.leak !== undefined && image.leak !== null
                ? el(
                    "span",
                    { class: image.leak > 0.5 ? "at-leak at-leaks" : "at-leak" },
                    `leak ${Math.round(100 * image.leak)} %`,
                  )
                : null,
            ),
          ),
        ),
      ),
    );
  }
}
