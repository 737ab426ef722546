// The loss curve: raw and smoothed loss, validation loss, learning rate, and a mark at each save.

import { el, plot } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { drawWith } = connect(gradio);
  drawWith((root, view) => {
    if (!(view.loss || []).length) {
      root.replaceChildren();
      return;
    }
    const width = 640,
      height = 220,
      left = 62,
      right = 12,
      top = 12,
      bottom = 26;
    const validation = view.validation || [];
    const training = view.training || []; // at the same noise as the validation
    const values = [...view.smooth, ...view.loss, ...validation, ...training].map(
      (point) => point[1],
    );
    const sorted = [...values].sort((a, b) => a - b);
    const low = sorted[0],
      high = Math.max(sorted[Math.floor(0.99 * (sorted.length - 1))], low + 1e-6); // one wild step must not flatten the rest
    const last = Math.max(view.total, 1);
    const x = (step) => left + ((width - left - right) * step) / last;
    const y = (value) =>
      top + (height - top - bottom) * (1 - (Math.min(value, high) - low) / (high - low));
    const line = (points, style) =>
      el("polyline", {
        class: style,
        points: points
          .map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`)
          .join(" "),
      });
    const ticks = [low, (low + high) / 2, high].map((value) =>
      el(
        "g",
        {},
        el("line", { class: "at-rule", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
        el("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(2)),
      ),
    );
    const saves = (view.saves || []).map((step) =>
      el(
        "g",
        {},
        el("line", { class: "at-save", x1: x(step), x2: x(step), y1: top, y2: height - bottom }),
        el(
          "text",
          {
            class: step === view.best ? "at-star" : "",
            x: x(step),
            y: height - 8,
            "text-anchor": step > 0.95 * last ? "end" : "middle",
          },
          step === view.best ? `★ ${step}` : String(step),
        ),
      ),
    );
    const rates = view.rates || [],
      fastest = Math.max(...rates.map((point) => point[1]), 1e-12);
    const rate =
      rates.length > 1
        ? el("polyline", {
            class: "at-rate",
            points: rates
              .map(
                ([step, value]) =>
                  `${x(step).toFixed(1)},${(height - bottom - (0.3 * (height - top - bottom) * value) / fastest).toFixed(1)}`,
              )
              .join(" "),
          })
        : null;
    const now = view.smooth[view.smooth.length - 1];
    root.replaceChildren(
      el(
        "figure",
        { class: "at-panel at-curve" },
        plot(
          width,
          height,
          `Loss, ${now[1].toPrecision(3)} at step ${now[0]}`,
          ticks,
          saves,
          rate,
          line(view.loss, "at-raw"),
          line(view.smooth, "at-smooth"),
          validation.length > 1 ? line(validation, "at-valid") : null,
          training.length > 1 ? line(training, "at-valid at-own") : null,
          validation.map(([step, value]) =>
            el(
              "circle",
              { class: "at-valid-dot", cx: x(step), cy: y(value), r: 3.5 },
              el("title", {}, `Validation ${value.toPrecision(4)} at step ${step}`),
            ),
          ),
        ),
        el(
          "figcaption",
          { class: "at-legend" },
          el("span", { class: "at-key-smooth" }, "Loss (smoothed)"),
          validation.length ? el("span", { class: "at-key-valid" }, "Validation") : null,
          training.length > 1
            ? el("span", { class: "at-key-own" }, "Training images, same noise")
            : null,
          rate
            ? el(
                "span",
                { class: "at-key-rate" },
                `Learning rate, up to ${Number(fastest.toPrecision(2))}`,
              )
            : null,
          view.best !== null && view.best !== undefined ? el("span", {}, "★ best save") : null,
        ),
      ),
    );
  });
}
