// Samples of the run: a row per prompt. Beside the base's picture the chosen one, with a divider between them; below, all of them.
const memory = {};  // what was chosen, by prompt and seed
drawWith((root, view) => {
  const rows = view.rows || [];
  if (!rows.length) { root.replaceChildren(); return; }
  const again = () => root.replaceChildren(el("section", { class: "at-panel", "aria-label": "Samples" }, el("h3", {}, "Samples"), rows.map((row) => rowOf(row, view.best, again))));
  again();
});

function rowOf(row, best, again) {
  const key = `${row.prompt} ${row.seed}`;
  const nameOfStep = (picture) => picture.step === 0 ? "Base" : picture.step === best ? `★ Step ${picture.step}` : `Step ${picture.step}`;
  const alt = (picture) => `${nameOfStep(picture)}: ${row.prompt}`;
  const [base, ...later] = row.pictures;
  const chosen = later.find((picture) => picture.step === memory[key]) || later[later.length - 1];
  const thumbnail = (picture) => el("button", { type: "button", class: "at-zoom", "aria-label": `Show ${alt(picture)}`, "aria-pressed": String(picture === chosen),
    onclick: () => { memory[key] = picture.step; again(); } }, el("img", { src: picture.src, alt: alt(picture) }));
  return el("div", { class: "at-samples" }, el("p", { class: "at-prompt" }, row.prompt, el("span", { class: "at-hint" }, ` seed ${row.seed}`)),
    chosen && base.step === 0 ? compared({ src: base.src, alt: alt(base), name: "Base" }, { src: chosen.src, alt: alt(chosen), name: nameOfStep(chosen) }, key) : null,
    el("div", { class: "at-strip" }, row.pictures.map((picture) => el("figure", { class: picture.step === best ? "at-best" : "" },
      picture.step === 0 || !chosen ? zoomable(picture.src, alt(picture)) : thumbnail(picture), el("figcaption", {}, nameOfStep(picture))))));
}
