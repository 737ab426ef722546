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

// A finished adapter, a sample or a file of settings that is dropped anywhere fills the form of the Train tab again.
const HEADER_LIMIT = 16 * 2 ** 20;
const KEPT = /^(atelier_config|ss_(?!tag_frequency|bucket_info|dataset_dirs|datasets).*|modelspec\.(title|trigger_phrase))$/;

async function settingsOf(file) {
  const name = file.name.toLowerCase();
  if (name.endsWith(".safetensors")) {
    const length = Number(new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
    if (length > HEADER_LIMIT) return "";
    const metadata = JSON.parse(await file.slice(8, 8 + length).text()).__metadata__ || {};
    return JSON.stringify(Object.fromEntries(Object.entries(metadata).filter(([key]) => KEPT.test(key))));
  }
  if (name.endsWith(".png")) {
    const text = new TextDecoder("utf-8").decode(await file.slice(0, 200_000).arrayBuffer());
    const found = /parameters\0+([^]*?Steps: [^]*?)[\0\n]?.{4}(IDAT|tEXt|iTXt)/.exec(text);
    return found ? JSON.stringify({ parameters: found[1] }) : "";
  }
  return file.text();
}

function wanted(event) {
  const items = [...(event.dataTransfer?.items || [])].filter((item) => item.kind === "file");
  return items.length === 1 && !event.target.closest?.("#dataset-view, input, textarea, .upload-container");
}

if (!window.atelierDrop) {
  window.atelierDrop = true;
  document.addEventListener("dragover", (event) => { if (wanted(event)) event.preventDefault(); });
  document.addEventListener("drop", async (event) => {
    if (!wanted(event)) return;
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    let text = "";
    try { text = await settingsOf(file); } catch { text = ""; }
    trigger("refill", { text });
  });
}
