// Samples of the run: a row per prompt, the base first, then one picture per save.
drawWith((root, view) => {
  const rows = view.rows || [];
  if (!rows.length) { root.replaceChildren(); return; }
  root.replaceChildren(el("section", { class: "at-panel", "aria-label": "Samples" }, el("h3", {}, "Samples"), rows.map((row) =>
    el("div", { class: "at-samples" }, el("p", { class: "at-prompt" }, row.prompt, el("span", { class: "at-hint" }, ` seed ${row.seed}`)),
      el("div", { class: "at-strip" }, row.pictures.map((picture) => {
        const name = picture.step === 0 ? "Base" : picture.step === view.best ? `★ Step ${picture.step}` : `Step ${picture.step}`;
        return el("figure", { class: picture.step === view.best ? "at-best" : "" }, zoomable(picture.src, `${name}: ${row.prompt}`), el("figcaption", {}, name));
      }))))));
});
