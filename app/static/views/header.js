// The header of every tab: the state of the newest run and the device. Also sets the title of the
// window, notifies when a run ends, and handles files that are dropped anywhere.

import { el, carried } from "../lib/dom.js";
import { connect } from "../lib/view.js";
import { SELECTORS } from "../gradio.js";

export function mount(gradio) {
  const { trigger } = gradio;
  const { drawWith } = connect(gradio);
  const memory = { watched: null };
  const ENDS = {
    finished: "is finished",
    failed: "has failed",
    stopped: "is stopped",
    interrupted: "was interrupted",
  };

  drawWith((root, view) => {
    announce(view);
    const state = el(
      "button",
      {
        type: "button",
        class: `at-pill at-${view.tone || "quiet"} ${view.busy ? "at-live" : ""}`,
        id: "state-pill",
        title: "Open the Train tab",
        onclick: () => trigger("go_train"),
      },
      view.text || "Idle",
    );
    root.replaceChildren(
      el(
        "header",
        { class: "at-header" },
        el("h1", {}, el("span", { class: "at-mark", "aria-hidden": "true" }), "LoRA Atelier"),
        state,
        el("span", { class: "at-device" }, view.device || ""),
      ),
    );
  });

  function announce(view) {
    const ended = memory.watched && view.run === memory.watched && ENDS[view.state];
    if (view.busy) memory.watched = view.run;
    if (view.busy) document.title = `${view.text} · LoRA Atelier`;
    else if (ended) document.title = `${view.name} ${ended}`;
    else if (!memory.watched) document.title = "LoRA Atelier";
    if (!ended) return;
    memory.watched = null;
    if (window.Notification && Notification.permission === "granted")
      new Notification(`${view.name} ${ended}`, { tag: view.run });
  }

  // A dropped adapter, sample or settings file fills the form of the Train tab. All other files are
  // added to the dataset. Without these listeners the browser would leave the page and open the file.
  const HEADER_LIMIT = 16 * 2 ** 20;
  const KEPT =
    /^(atelier_config|ss_(?!tag_frequency|bucket_info|dataset_dirs|datasets).*|modelspec\.(title|trigger_phrase))$/;
  const SETTINGS = /\.(safetensors|json|toml|ya?ml)$/i;

  async function settingsOf(file) {
    const name = file.name.toLowerCase();
    if (name.endsWith(".safetensors")) {
      const length = Number(
        new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true),
      );
      if (length > HEADER_LIMIT) return "";
      const metadata = JSON.parse(await file.slice(8, 8 + length).text()).__metadata__ || {};
      return JSON.stringify(
        Object.fromEntries(Object.entries(metadata).filter(([key]) => KEPT.test(key))),
      );
    }
    if (name.endsWith(".png")) {
      const text = new TextDecoder("utf-8").decode(await file.slice(0, 200_000).arrayBuffer());
      const found = /parameters\0+([^]*?Steps: [^]*?)[\0\n]?.{4}(IDAT|tEXt|iTXt)/.exec(text);
      return found ? JSON.stringify({ parameters: found[1] }) : "";
    }
    return SETTINGS.test(name) ? file.text() : "";
  }

  const datasetTab = () => /** @type {HTMLElement} */ (document.querySelector(SELECTORS.tab));

  /** Opens the Dataset tab, waits until it is drawn, and passes the dropped files on. */
  async function toDataset(load) {
    datasetTab().click();
    while (!document.querySelector(".at-dataset")) await new Promise(requestAnimationFrame);
    document
      .querySelector(".at-dataset")
      .dispatchEvent(new CustomEvent("carried", { detail: load }));
  }

  if (!window.atelierDrop) {
    window.atelierDrop = true;
    const isWanted = (event) =>
      event.dataTransfer?.types.includes("Files") && !event.defaultPrevented;
    document.addEventListener("dragover", (event) => {
      if (isWanted(event)) event.preventDefault();
    });
    document.addEventListener("drop", async (event) => {
      if (!isWanted(event)) return;
      event.preventDefault();
      const load = carried(event.dataTransfer),
        [file, second] = load.files,
        isSettings = SETTINGS.test(file?.name);
      // A sample is an image too. If the Dataset tab is open, it is added to the dataset.
      const mayContainSettings =
        file && !second && (isSettings || datasetTab().getAttribute("aria-selected") !== "true");
      const text = mayContainSettings ? await settingsOf(file).catch(() => "") : "";
      if (text || (mayContainSettings && isSettings)) trigger("refill", { text });
      else toDataset(load);
    });
  }
}
