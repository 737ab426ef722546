// Above Start: what the run will take, its memory by phase, and what stands in the way, each with its cure.

import { el, notice, button } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { trigger } = gradio;
  const { drawWith } = connect(gradio);
  drawWith((root, view) => {
    const parts = [];
    if (view.steps) {
      parts.push(el("p", {}, view.sum, el("b", {}, view.steps), " ", view.time));
      parts.push(el("p", { class: "at-hint" }, view.facts.join(" · ")));
    }
    if (view.memory) parts.push(memoryBars(view.memory));
    if (view.refused) parts.push(notice(view.refused, "bad"));
    const checks = view.checks || [];
    if (checks.length)
      parts.push(
        el("ul", { class: "at-checks", "aria-label": "Before the start" }, checks.map(line)),
      );
    if (view.started) parts.push(notice(view.started, "quiet"));
    root.replaceChildren(el("div", { class: "at-estimate", "aria-live": "polite" }, parts));
  });

  function line(check) {
    const cure = check.cure;
    return el(
      "li",
      { class: `at-check at-${check.level}`, role: check.level === "bad" ? "alert" : null },
      el("span", {}, check.text),
      cure ? button(cure.label, () => mend(cure), "at-small") : null,
    );
  }

  function mend(cure) {
    if (cure.go) trigger("go_dataset");
    else if (cure.example) trigger("take_example", { example: cure.example });
    else if (cure.base) trigger("take_base", { base: cure.base });
    else if (cure.reset) trigger("reset", { paths: cure.reset });
    else trigger("cure", { changes: cure.changes });
  }

  /** A bar per phase; the fullest decides whether the run fits. */
  function memoryBars(memory) {
    const text = `Memory, GB: ${memory.phases.map((phase) => `${phase.name} ${phase.text}`).join(", ")}`;
    return el(
      "figure",
      { class: `at-memory ${memory.fits ? "" : "at-tight"}`, "aria-label": text },
      el(
        "figcaption",
        { class: "at-hint" },
        `About ${memory.peak} of memory`,
        memory.total ? ` of ${memory.total}` : "",
      ),
      el(
        "div",
        { "aria-hidden": "true" },
        memory.phases.map((phase) =>
          el(
            "div",
            { class: phase.name === memory.worst ? "at-worst" : "" },
            el("span", {}, phase.name),
            el(
              "i",
              {},
              el("b", { style: `width:${(100 * Math.min(1, phase.share)).toFixed(0)}%` }),
            ),
            el("span", {}, phase.text),
          ),
        ),
      ),
    );
  }
}
