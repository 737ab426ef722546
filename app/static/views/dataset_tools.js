// What is done to all pictures: captions, tags, captions by a model, crops, and the dataset itself. One panel is open at a time; one to type in keeps what is typed when the tab is drawn anew.

import { el, pill, notice, button, plural } from "../lib/dom.js";

export function datasetTools(context) {
  const PANELS = {
    captions: ["Edit captions", captionsPanel, "typed in"],
    tags: ["Tags", tagsPanel],
    models: ["Auto-caption", modelsPanel, "typed in"],
    crops: ["Crops", cropsPanel],
    dataset: ["Dataset", datasetPanel, "typed in"],
  };

  function tools(view) {
    const open = (name) => {
      context.memory.panel = context.memory.panel === name ? "" : name;
      context.root().querySelector(".at-tools").replaceWith(tools(context.memory.view));
    };
    const tabs = Object.entries(PANELS).map(([name, [title]]) =>
      el(
        "button",
        {
          type: "button",
          class: `at-button at-small ${context.memory.panel === name ? "at-chosen" : ""}`,
          "data-panel": name,
          "aria-expanded": context.memory.panel === name ? "true" : "false",
          onclick: () => open(name),
        },
        title,
      ),
    );
    return el(
      "section",
      { class: "at-tools", "aria-label": "Tools for all images" },
      context.fold(
        "tools",
        "Tools: captions, tags, crops, dataset",
        el("div", { class: "at-row" }, tabs),
        context.memory.panel ? el("div", { class: "at-panel" }, openPanel(view)) : null,
      ),
    );
  }

  function openPanel(view) {
    const [, draw, typedIn] = PANELS[context.memory.panel],
      key = `${context.memory.panel} ${view.name} ${tagShown()}`;
    if (!typedIn || context.memory.drawn.key !== key)
      context.memory.drawn = { key, node: draw(view) };
    return context.memory.drawn.node;
  }

  const tagShown = () => (context.memory.filter && context.memory.filter.tag) || "";

  function field(label, attributes = {}) {
    const input = el("input", { type: "text", ...attributes });
    return [el("label", {}, el("span", {}, label), input), input];
  }

  function tick(label, attributes = {}) {
    const input = el("input", { type: "checkbox", ...attributes });
    return [el("label", { class: "at-tick" }, input, el("span", {}, label)), input];
  }

  // Captions

  const OPERATIONS = {
    replace: "Find and replace",
    prepend: "Add at the start",
    append: "Add at the end",
    rename: "Rename a tag",
    remove: "Remove a tag",
    sort: "Sort the tags",
    deduplicate: "Remove duplicate tags",
  };

  function captionsPanel() {
    const [findField, find] = field("Find", { id: "edit-find" }),
      [newField, replacement] = field("Replace with", { id: "edit-replace" }),
      [textField, text] = field("Text", { id: "edit-text" });
    const [patternTick, pattern] = tick("Regular expression", { id: "edit-pattern" }),
      [firstTick, first] = tick("Keep the first tag first", { checked: true });
    const places = {
      replace: [findField, newField, patternTick],
      prepend: [textField],
      append: [textField],
      rename: [findField, newField],
      remove: [findField],
      sort: [firstTick],
      deduplicate: [],
    };
    const inputs = el("div", { class: "at-row" }),
      result = el("div", { class: "at-changes", "aria-live": "polite" });
    const choice = el(
      "select",
      {
        id: "edit-operation",
        "aria-label": "Change",
        onchange: () => {
          inputs.replaceChildren(...places[choice.value]);
          result.replaceChildren();
        },
      },
      Object.entries(OPERATIONS).map(([value, title]) => el("option", { value }, title)),
    );
    const wish = () => ({
      operation: choice.value,
      find: find.value,
      replacement: replacement.value,
      text: text.value,
      pattern: pattern.checked,
      keep_first: first.checked,
      only: tagShown(),
    });
    const bad = (message) => result.replaceChildren(notice(message, "bad"));
    const preview = async () => {
      const asked = wish(),
        answer = await context.call("preview_edit", asked, bad);
      if (answer.error) return;
      const apply = async () => {
        const done = await context.call("apply_edit", asked, bad);
        if (!done.error) {
          result.replaceChildren();
          context.load();
        }
      };
      result.replaceChildren(
        el(
          "p",
          { class: "at-hint" },
          answer.count
            ? `${plural(answer.count, "caption")} would change${answer.count > answer.changes.length ? ". The first ones:" : ":"}`
            : "No caption would change.",
        ),
        el(
          "dl",
          {},
          answer.changes.flatMap((change) => [
            el("dt", {}, change.file),
            el(
              "dd",
              {},
              el("del", {}, change.before || "(none)"),
              el("ins", {}, change.after || "(none)"),
            ),
          ]),
        ),
        answer.count
          ? button(`Change ${plural(answer.count, "caption")}`, apply, "at-primary")
          : "",
      );
    };
    inputs.append(...places.replace);
    return el(
      "div",
      {},
      el("div", { class: "at-row" }, el("label", {}, el("span", {}, "Change"), choice)),
      inputs,
      tagShown()
        ? el("p", { class: "at-hint" }, `Only images with the tag “${tagShown()}”.`)
        : null,
      el("div", { class: "at-row" }, button("Preview", preview)),
      result,
    );
  }

  // Tags

  function tagsPanel(view) {
    const edit = async (asked) => {
      const answer = await context.call("apply_edit", asked);
      if (!answer.error) context.load();
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
            onclick: () => context.filterBy({ tag }),
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

  // Captions by a model

  function modelsPanel() {
    const sizes = el(
      "p",
      { class: "at-hint", role: "status" },
      "Choose a caption model, a tagger or both: a Hugging Face name or a local folder. Models are downloaded when you press Start.",
    );
    const [modelField, model] = field("Caption model", {
        id: "caption-model",
        value: "Salesforce/blip-image-captioning-base",
        list: "caption-models",
      }),
      [taggerField, tagger] = field("Tagger", {
        id: "caption-tagger",
        placeholder: "none, or SmilingWolf/wd-vit-tagger-v3",
      });
    const [prefixField, prefix] = field("Prefix"),
      [blackField, blacklist] = field("Excluded tags"),
      [sureField, threshold] = field("Tag threshold", {
        type: "number",
        min: 0,
        max: 1,
        step: 0.05,
        value: 0.35,
      });
    const [overTick, overwrite] = tick("Overwrite existing captions", {
      id: "caption-overwrite",
    });
    const wish = () => ({
      model: model.value,
      tagger: tagger.value,
      prefix: prefix.value,
      blacklist: blacklist.value,
      threshold: threshold.value,
      overwrite: overwrite.checked,
    });
    const tell = (text) => {
      sizes.textContent = text;
    };
    const start = async () => {
      const answer = await context.call("caption_start", wish(), tell);
      if (!answer.error) {
        context.memory.job = answer;
        drawJob();
        follow(true);
      }
    };
    const size = async () => {
      tell("Checking the download size …");
      const answer = await context.call("caption_size", wish(), tell);
      if (!answer.error) tell(answer.text);
    };
    return el(
      "div",
      {},
      el("div", { class: "at-row" }, modelField, taggerField),
      el("div", { class: "at-row" }, prefixField, blackField, sureField),
      overTick,
      sizes,
      el(
        "div",
        { class: "at-row" },
        button("Start", start, "at-primary"),
        button("Check download size", size),
      ),
    );
  }

  /** Follows a captioning job that runs, also one that another window or an earlier visit started. */
  async function follow(started = false) {
    const name = context.memory.name,
      job = await context.call("caption_status", {}, () => {});
    if (job.error || name !== context.memory.name) return;
    const wasRunning = started || (context.memory.job && context.memory.job.state === "running");
    context.memory.job = job.state === "running" || wasRunning ? job : null;
    drawJob();
    if (job.state === "running") {
      for (const { file, caption } of job.latest) {
        const box = [...context.root().querySelectorAll(".at-card")]
          .find((card) => card.dataset.file === file)
          ?.querySelector("textarea");
        if (box && box !== document.activeElement) box.value = caption;
      }
      setTimeout(() => name === context.memory.name && follow(true), 800);
    } else if (wasRunning) context.load();
  }

  function drawJob() {
    const place = context.root().querySelector(".at-job-place"),
      job = context.memory.job;
    if (!place) return;
    if (!job) return place.replaceChildren();
    const running = job.state === "running",
      part = job.total ? (100 * job.done) / job.total : 0;
    place.replaceChildren(
      el(
        "section",
        { class: "at-panel at-job", "data-state": job.state, "aria-label": "Auto-captioning" },
        el(
          "div",
          { class: "at-row" },
          pill(
            running
              ? job.loading || !job.total
                ? "Loading the model"
                : `Captioning ${job.done} of ${job.total}`
              : job.state === "done"
                ? "Captions"
                : "Captioning failed",
            running ? "busy" : job.state === "done" ? "good" : "bad",
          ),
          el("span", { class: "at-push" }),
          running
            ? button("Stop", () => context.call("caption_stop"), "at-small at-danger")
            : button(
                "Close",
                () => {
                  context.memory.job = null;
                  drawJob();
                },
                "at-small",
              ),
        ),
        running
          ? el("div", { class: "at-bar" }, el("div", { style: `width:${part}%` }))
          : notice(job.message, job.state === "done" ? "good" : "bad"),
        el(
          "ul",
          { class: "at-hint" },
          job.latest.map(({ file, caption }) => el("li", {}, el("b", {}, file), " ", caption)),
          job.warnings.map((text) => el("li", {}, text)),
        ),
      ),
    );
  }

  // Crops

  function cropsPanel() {
    const place = el("div", {}, el("p", { class: "at-hint" }, "…"));
    context.call("crops_overview").then((answer) => {
      if (answer.error) return;
      const most = Math.max(...answer.buckets.map((row) => row.count), 1);
      const kept = {
        centre: "the centre of each image is kept",
        salient: "the most salient part of each image is kept",
        none: "images are not cropped but stretched slightly",
      }[answer.crop];
      place.replaceChildren(
        el(
          "p",
          { class: "at-hint" },
          `At resolution ${answer.resolution}, ${kept}. Change both on the Train tab, under Images and captions. Click an image to move its crop.`,
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
                  el("span", { style: `width:${(100 * row.count) / most}%` }),
                  row.count,
                ),
              ),
            ),
          ),
        ),
      );
    });
    return place;
  }

  // The dataset itself

  function datasetPanel(view) {
    const [nameField, name] = field("Name", { value: view.name, id: "dataset-name" });
    const go = async (what, data) => {
      const answer = await context.call(what, data);
      if (!answer.error) context.changed(answer.name);
    };
    const remove = async () => {
      const answer = await context.call("remove_dataset");
      if (answer.error) return;
      context.memory.trash = { name: view.name, kept: answer.kept };
      context.changed(answer.name);
    };
    return el(
      "div",
      {},
      el(
        "div",
        { class: "at-row" },
        nameField,
        button("Rename", () => go("rename_dataset", { to: name.value })),
      ),
      el(
        "div",
        { class: "at-row" },
        button("Duplicate", () => go("copy_dataset")),
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
    if (!context.memory.trash) return null;
    const back = async () => {
      const answer = await context.call("restore_dataset", { kept: context.memory.trash.kept });
      context.memory.trash = null;
      if (!answer.error) context.changed(answer.name);
    };
    return el(
      "div",
      { class: "at-row at-notice" },
      `The dataset ${context.memory.trash.name} is in the trash.`,
      button("Restore", back, "at-small"),
      button(
        "✕",
        () => {
          context.memory.trash = null;
          context.paint();
        },
        "at-small",
      ),
    );
  }

  return { tools, trashBar, drawJob, follow };
}
