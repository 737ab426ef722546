// Above the advanced fields: search, changes from the preset, own presets, import and export.

import { el, notice, button, saveText } from "../lib/dom.js";
import { connect } from "../lib/view.js";
import { SELECTORS } from "../gradio.js";

export function mount(gradio) {
  const { trigger, constant } = gradio;
  const { drawWith } = connect(gradio);
  const memory = { search: "", title: "", message: "", problem: "" };
  const fieldId = (path) => `field-${path.replaceAll(".", "-")}`;
  const style = document.head.appendChild(el("style", { id: "advanced-style" }));

  drawWith((root, view) => {
    memory.changed = view.changed || memory.changed || [];
    memory.own = view.own === undefined ? memory.own : view.own;
    if (view.said !== undefined || view.problem !== undefined)
      Object.assign(memory, { message: view.said || "", problem: view.problem || "" });
    if (view.download) saveText(view.download.name, view.download.text);
    mark();
    const search = el("input", {
      type: "search",
      id: "advanced-search",
      placeholder: "Search the settings",
      "aria-label": "Search the settings",
      oninput: (event) => {
        memory.search = event.target.value;
        mark(true);
      },
    });
    search.value = memory.search;
    const hadFocus = document.activeElement && document.activeElement.id === "advanced-search";
    root.replaceChildren(
      el(
        "div",
        { class: "at-advanced" },
        search,
        changes(),
        files(),
        memory.message ? notice(memory.message, "quiet") : null,
        memory.problem ? notice(memory.problem, "bad") : null,
      ),
    );
    if (hadFocus) search.focus();
  });

  function changes() {
    if (!memory.changed.length) return null;
    const reset = (paths) => {
      memory.message = memory.problem = "";
      trigger("reset", { paths });
    };
    return el(
      "div",
      { class: "at-changed" },
      el("span", { class: "at-hint" }, "Changed:"),
      memory.changed.map((field) =>
        el(
          "button",
          {
            type: "button",
            class: "at-chip",
            title: `Reset to ${field.was || "nothing"}`,
            "aria-label": `Reset ${field.label} to ${field.was || "nothing"}`,
            onclick: () => reset([field.path]),
          },
          `${field.label} ${field.now || "nothing"} ↺`,
        ),
      ),
      memory.changed.length > 1
        ? button("Reset all", () => reset(memory.changed.map((field) => field.path)), "at-small")
        : null,
    );
  }

  function files() {
    const title = el("input", {
      type: "text",
      placeholder: "Preset name",
      "aria-label": "Preset name",
      maxlength: 60,
      oninput: (event) => {
        memory.title = event.target.value;
      },
    });
    title.value = memory.title;
    const chooser = el("input", {
      type: "file",
      id: "settings-file",
      hidden: true,
      accept: ".toml,.json,.yaml,.yml",
      onchange: async () => {
        if (chooser.files[0]) trigger("import_settings", { text: await chooser.files[0].text() });
      },
    });
    return el(
      "details",
      {
        open: memory.filesOpen,
        ontoggle: (event) => {
          memory.filesOpen = event.target.open;
        },
      },
      el("summary", {}, "Presets and files"),
      el(
        "div",
        { class: "at-row" },
        title,
        button("Save as preset", () => trigger("save_recipe", { title: memory.title }), "at-small"),
        memory.own
          ? button(
              "Delete this preset",
              () => {
                if (confirm("Delete this preset?")) trigger("remove_recipe");
              },
              "at-small at-danger",
            )
          : null,
      ),
      el(
        "div",
        { class: "at-row" },
        button("Export as TOML", () => trigger("export_settings"), "at-small"),
        button("Import settings", () => chooser.click(), "at-small"),
        chooser,
        el(
          "span",
          { class: "at-hint" },
          "Imports TOML of LoRA Atelier and settings of kohya_ss, OneTrainer and ai-toolkit",
        ),
      ),
    );
  }

  /** Marks changed fields and hides the rest by a style sheet, because Gradio draws some fields late. */
  function mark(typed = false) {
    const rules = memory.changed.map(
      (field) => `#${fieldId(field.path)} { box-shadow: inset 3px 0 0 var(--at-gold) !important; }`,
    );
    const words = memory.search.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length) {
      const found = constant.filter((field) => words.every((word) => field.text.includes(word)));
      const sections = new Set(found.map((field) => field.section));
      for (const field of constant)
        if (!found.includes(field))
          rules.push(`#${fieldId(field.path)} { display: none !important; }`);
      for (const section of new Set(constant.map((field) => field.section)))
        if (!sections.has(section)) rules.push(`#section-${section} { display: none !important; }`);
      if (typed) for (const section of sections) openSection(section);
    }
    style.textContent = rules.join("\n");
  }

  function openSection(section) {
    const accordion = document.querySelector(`#section-${section}`);
    /** @type {HTMLElement | undefined} */
    const label = accordion?.querySelector(SELECTORS.accordionButton);
    if (label && !label.matches(SELECTORS.openAccordion)) label.click();
  }
}
