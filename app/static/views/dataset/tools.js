// Tools for all images: captions, tags, auto-captions, crops, and the dataset itself. One panel is
// open at a time. A panel to type in keeps its text when the tab is redrawn.

import { el, button } from "../../lib/dom.js";
import { createAutoCaption } from "./auto_caption.js";
import { createEditPanel, shownTag } from "./edit_captions.js";
import { field } from "./fields.js";

export function createTools(context) {
  const { memory, root, call, load, paint, changed, fold, filterBy } = context;
  const { modelsPanel, follow, drawJob } = createAutoCaption(context);
  const PANELS = {
    captions: { title: "Edit captions", draw: createEditPanel(context), keepsText: true },
    tags: { title: "Tags", draw: tagsPanel },
    models: { title: "Auto-caption", draw: modelsPanel, keepsText: true },
    crops: { title: "Crops", draw: cropsPanel },
    dataset: { title: "Dataset", draw: datasetPanel, keepsText: true },
  };

  function tools(view) {
    const open = (name) => {
      memory.panel = memory.panel === name ? "" : name;
      root().querySelector(".at-tools").replaceWith(tools(memory.view));
    };
    const tabs = Object.entries(PANELS).map(([name, { title }]) =>
      el(
        "button",
        {
          type: "button",
          class: `at-button at-small ${memory.panel === name ? "at-chosen" : ""}`,
          "data-panel": name,
          "aria-expanded": memory.panel === name ? "true" : "false",
          onclick: () => open(name),
        },
        title,
      ),
    );
    return el(
      "section",
      { class: "at-tools", "aria-label": "Tools for all images" },
      fold(
        "tools",
        "Tools: captions, tags, crops, dataset",
        el("div", { class: "at-row" }, tabs),
        memory.panel ? el("div", { class: "at-panel" }, openPanel(view)) : null,
      ),
    );
  }

  function openPanel(view) {
    const { draw, keepsText } = PANELS[memory.panel];
    const key = `${memory.panel} ${view.name} ${shownTag(memory)}`;
    if (!keepsText || memory.drawn.key !== key) memory.drawn = { key, node: draw(view) };
    return memory.drawn.node;
  }

  function tagsPanel(view) {
    const edit = async (change) => {
      const answer = await call("apply_edit", change);
      if (!answer.error) load();
    };
    const chip = ([tag, count]) =>
      el(
        "span",
        { class: "at-word" },
        el(
          "button",
          {
            type: "button",
            class: "at-word-name",
            title: "Show only these images",
            onclick: () => filterBy({ tag }),
          },
          tag,
          el("small", {}, ` ${count}`),
        ),
        el(
          "button",
          {
            type: "button",
            "aria-label": `Rename the tag ${tag}`,
            title: "Rename everywhere",
            onclick: () => {
              const name = prompt(`Rename the tag “${tag}” everywhere to`, tag);
              if (name && name !== tag) edit({ operation: "rename", find: tag, replacement: name });
            },
          },
          "✎",
        ),
        el(
          "button",
          {
            type: "button",
            "aria-label": `Remove the tag ${tag}`,
            title: "Remove everywhere",
            onclick: () => edit({ operation: "remove", find: tag }),
          },
          "✕",
        ),
      );
    return el(
      "div",
      {},
      el(
        "p",
        { class: "at-hint" },
        "Comma-separated parts of the captions, most frequent first. Click a tag to see its images.",
      ),
      el("div", { class: "at-words" }, (view.tags || []).map(chip)),
    );
  }

  function cropsPanel() {
    const panel = el("div", {}, el("p", { class: "at-hint" }, "…"));
    call("crops_overview").then((answer) => {
      if (answer.error) return;
      const highest = Math.max(...answer.buckets.map((row) => row.count), 1);
      const rule = {
        centre: "the centre of each image is kept",
        salient: "the most salient part of each image is kept",
        none: "images are not cropped but stretched slightly",
      }[answer.crop];
      panel.replaceChildren(
        el(
          "p",
          { class: "at-hint" },
          `At resolution ${answer.resolution}, ${rule}. Change both on the Train tab, under Images and captions. Click an image to move its crop.`,
        ),
        el(
          "table",
          { class: "at-buckets" },
          el("caption", {}, "Images per bucket"),
          el(
            "tbody",
            {},
            answer.buckets.map((row) =>
              el(
                "tr",
                {},
                el(
                  "th",
                  { scope: "row" },
                  el("i", { style: `aspect-ratio:${row.ratio}` }),
                  row.size,
                ),
                el(
                  "td",
                  {},
                  el("span", { style: `width:${(100 * row.count) / highest}%` }),
                  row.count,
                ),
              ),
            ),
          ),
        ),
      );
    });
    return panel;
  }

  function datasetPanel(view) {
    const [nameField, name] = field("Name", { value: view.name, id: "dataset-name" });
    const change = async (what, data) => {
      const answer = await call(what, data);
      if (!answer.error) changed(answer.name);
    };
    const remove = async () => {
      const answer = await call("remove_dataset");
      if (answer.error) return;
      memory.trash = { name: view.name, kept: answer.kept };
      changed(answer.name);
    };
    return el(
      "div",
      {},
      el(
        "div",
        { class: "at-row" },
        nameField,
        button("Rename", () => change("rename_dataset", { to: name.value })),
      ),
      el(
        "div",
        { class: "at-row" },
        button("Duplicate", () => change("copy_dataset")),
        el(
          "a",
          {
            class: "at-button",
            href: `/datasetfile/${encodeURIComponent(view.name)}.zip`,
            download: `${view.name}.zip`,
          },
          "Download as .zip",
        ),
        button("Delete this dataset", remove, "at-danger"),
      ),
    );
  }

  function trashBar() {
    if (!memory.trash) return null;
    const restore = async () => {
      const answer = await call("restore_dataset", { kept: memory.trash.kept });
      memory.trash = null;
      if (!answer.error) changed(answer.name);
    };
    return el(
      "div",
      { class: "at-row at-notice" },
      `The dataset ${memory.trash.name} is in the trash.`,
      button("Restore", restore, "at-small"),
      button(
        "✕",
        () => {
          memory.trash = null;
          paint();
        },
        "at-small",
      ),
    );
  }

  return { tools, trashBar, drawJob, follow };
}
