// The comparison of two chosen runs: samples, loss curves and different settings.

import { el, button, zoomable, plot } from "../../lib/dom.js";

export function createComparison(context) {
  const { memory, root, ask, redraw, showProblem } = context;

  /** Returns both chosen runs beside each other, or null. */
  function comparison() {
    const both = memory.compared;
    if (memory.chosen.length !== 2 || !both) return null;
    const close = () => {
      memory.chosen = [];
      memory.compared = null;
      redraw();
    };
    return el(
      "section",
      { class: "at-panel at-side", "aria-label": "Comparison" },
      el(
        "div",
        { class: "at-row" },
        el("h3", {}, `${both.runs[0].name} and ${both.runs[1].name}`),
        el("span", { class: "at-push" }),
        button("Close", close, "at-small"),
      ),
      el(
        "div",
        { class: "at-pictures at-pair" },
        both.runs.map((run) =>
          el(
            "figure",
            {},
            run.sample
              ? zoomable(run.sample, `${run.name}: ${run.prompt}`)
              : el("div", { class: "at-placeholder" }, "no sample"),
            el("figcaption", {}, `${run.name}: ${run.prompt}`),
          ),
        ),
      ),
      curves(both.runs),
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ["Setting", both.runs[0].name, both.runs[1].name].map((text) =>
              el("th", { scope: "col" }, text),
            ),
          ),
        ),
        el(
          "tbody",
          {},
          both.settings.map((field) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, field.label),
              el("td", {}, field.was || "–"),
              el("td", {}, field.now || "–"),
            ),
          ),
        ),
      ),
      both.settings.length ? null : el("p", { class: "at-hint" }, "All settings are the same."),
    );
  }

  function curves(pair) {
    const points = pair.flatMap((run) => run.loss);
    if (!points.length) return null;
    const width = 640,
      height = 180,
      highest = Math.max(...points.map((point) => point[1])),
      lowest = Math.min(...points.map((point) => point[1])),
      last = Math.max(...points.map((point) => point[0]), 1);
    const position = ([step, loss]) =>
      `${((width * step) / last).toFixed(1)},${(8 + (height - 16) * (1 - (loss - lowest) / (highest - lowest || 1))).toFixed(1)}`;
    return el(
      "figure",
      { class: "at-curve" },
      plot(
        width,
        height,
        `Loss of both runs over ${last} steps, from ${highest.toPrecision(2)} to ${lowest.toPrecision(2)}`,
        pair.map((run, index) =>
          el("polyline", {
            class: index ? "at-valid" : "at-smooth",
            points: run.loss.map(position).join(" "),
          }),
        ),
      ),
      el(
        "figcaption",
        { class: "at-legend" },
        pair.map((run, index) =>
          el("span", { class: index ? "at-key-valid" : "at-key-smooth" }, run.name),
        ),
      ),
    );
  }

  /** Adds a run to the comparison or removes it. The newest two stay chosen. */
  async function choose(run) {
    memory.chosen = memory.chosen.includes(run)
      ? memory.chosen.filter((other) => other !== run)
      : [...memory.chosen, run].slice(-2);
    memory.compared = null;
    if (memory.chosen.length === 2) {
      const [first, second] = memory.chosen;
      const answer = await ask("compare", { first, second }, showProblem);
      if (!answer.error) memory.compared = answer;
    }
    redraw();
    if (memory.chosen.length === 2)
      // The comparison is above all cards, so it may be out of sight.
      root().querySelector(":scope > .at-notice, :scope > .at-side")?.scrollIntoView();
  }

  return { comparison, choose };
}
