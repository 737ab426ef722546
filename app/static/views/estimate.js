// Above Start: estimated time and memory of the run, and the checks with their fixes.

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
    const fix = check.cure;
    return el(
      "li",
      { class: `at-check at-${check.level}`, role: check.level === "bad" ? "alert" : null },
      el("span", {}, check.text),
      fix ? button(fix.label, () => apply(fix), "at-small") : null,
    );
  }

  function apply(fix) {
    if (fix.go) trigger("go_dataset");
    else if (fix.example) trigger("take_example", { example: fix.example });
    else if (fix.base) trigger("take_base", { base: fix.base });
    else if (fix.reset) trigger("reset", { paths: fix.reset });
    else trigger("cure", { changes: fix.changes });
  }

  /** Returns a bar for each phase. The run fits if the highest one does. */
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
