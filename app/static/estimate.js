// The live line above Start: what the run will take, or what stands in its way.
drawWith((root, view) => {
  const parts = [];
  if (view.hint) parts.push(el("p", { class: "at-hint" }, view.hint));
  for (const fault of view.faults || []) parts.push(notice(fault, "bad"));
  if (view.steps) {
    parts.push(el("p", {}, view.sum, el("b", {}, view.steps), ", ", view.facts.join("; ")));
    if (view.held_out) parts.push(el("p", { class: "at-hint" }, view.held_out));
  }
  for (const note of view.notes || []) parts.push(notice(note, "warn"));
  if (view.started) parts.push(notice(view.started, "quiet"));
  root.replaceChildren(el("div", { class: "at-estimate", "aria-live": "polite" }, parts));
});
