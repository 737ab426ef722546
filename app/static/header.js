// Name, what is going on, and on which device: on every tab. Says so in the title of the window too, and tells when a run is done.
const memory = { watched: null };
const ENDS = { finished: "is finished", failed: "has failed", stopped: "is stopped", interrupted: "was interrupted" };

drawWith((root, view) => {
  announce(view);
  const state = el("button", { type: "button", class: `at-pill at-${view.tone || "quiet"} ${view.busy ? "at-live" : ""}`, id: "state-pill",
    title: "Open the Train tab", onclick: () => trigger("go_train") }, view.text || "Idle");
  root.replaceChildren(el("header", { class: "at-header" },
    el("h1", {}, el("span", { class: "at-mark", "aria-hidden": "true" }), "LoRA Atelier"), state, el("span", { class: "at-device" }, view.device || "")));
});

function announce(view) {
  const ended = memory.watched && view.run === memory.watched && ENDS[view.state];
  if (view.busy) memory.watched = view.run;
  if (view.busy) document.title = `${view.text} · LoRA Atelier`;
  else if (ended) document.title = `${view.name} ${ended}`;
  else if (!memory.watched) document.title = "LoRA Atelier";
  if (!ended) return;
  memory.watched = null;
  if (window.Notification && Notification.permission === "granted") new Notification(`${view.name} ${ended}`, { tag: view.run });
}
