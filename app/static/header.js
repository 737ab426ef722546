// Name, what is going on, and on which device: on every tab.
drawWith((root, view) => {
  const state = el("button", { type: "button", class: `at-pill at-${view.tone || "quiet"} ${view.busy ? "at-live" : ""}`, id: "state-pill",
    title: "Open the Train tab", onclick: () => trigger("go_train") }, view.text || "Idle");
  root.replaceChildren(el("header", { class: "at-header" },
    el("h1", {}, el("span", { class: "at-mark", "aria-hidden": "true" }), "LoRA Atelier"), state, el("span", { class: "at-device" }, view.device || "")));
});
