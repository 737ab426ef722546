// The Dataset tab: drop area, what the doctor says, and one page of pictures with their captions, which save themselves.

import { el, pill, notice, button, carried, plural } from "../lib/dom.js";
import { connect } from "../lib/view.js";
import { imageDialog } from "./image_dialog.js";
import { datasetTools } from "./dataset_tools.js";

export function mount(gradio) {
  const { trigger, upload } = gradio;
  const { root, drawWith, keepingPlace, ask } = connect(gradio);
  /** What the dialog and the tools share with this view. It is complete before anything is drawn. */
  const context = {};
  const openImage = imageDialog(context);
  const { tools, trashBar, drawJob, follow } = datasetTools(context);
  const memory = {
    name: "",
    turn: 0,
    page: 0,
    filter: null,
    panel: "",
    messages: [],
    working: "",
    view: null,
    timers: new Map(),
    refresh: null,
    trash: null,
    open: new Set(),
    edits: 0,
    savedFile: "",
    drawn: {},
  };
  let settings = {};

  drawWith((root, value) => {
    if (!value.settings || value.settings.resolution === undefined) return; // those of the Train tab are on their way
    settings = value.settings;
    if (value.name === undefined) {
      if (memory.exists) load();
      return;
    }
    memory.exists = value.exists;
    if (value.name !== memory.name)
      Object.assign(memory, {
        name: value.name,
        page: 0,
        filter: null,
        panel: "",
        open: new Set(),
        followed: "",
      });
    if (value.exists) load();
    else {
      memory.turn++;
      memory.view = { name: value.name, examples: value.examples, cards: [], groups: [], total: 0 };
      paint();
    }
  });

  const call = (name, data = {}, onerror = say) =>
    ask(name, { dataset: memory.name, settings, ...data }, onerror);
  const changed = (name) => trigger("change_dataset", { name });
  const say = (text) => {
    const place = root().querySelector(".at-note");
    if (place) place.replaceChildren(notice(text, "bad"));
  };
  /** Does it when nothing of that name was asked for during some milliseconds. */
  const whenQuiet = (name, work, milliseconds) => {
    clearTimeout(memory.timers.get(name));
    memory.timers.set(name, setTimeout(work, milliseconds));
  };

  /** Asks for the page again; `turn` only turns it, without looking at the folder. */
  async function load({ turn = false } = {}) {
    const mine = ++memory.turn,
      edits = memory.edits;
    const view = await call("view", { page: memory.page, filter: memory.filter, turn });
    if (mine !== memory.turn || view.error) return;
    if (edits !== memory.edits) return load({ turn }); // it may be of before the edit
    if (view.scanning) {
      working(
        view.scanning.total
          ? `Checking ${view.scanning.done} of ${plural(view.scanning.total, "image")}`
          : "Checking the images",
      );
      if (!root().querySelector(".at-dataset")) {
        memory.view = { ...view, examples: [] };
        paint();
      }
      setTimeout(() => mine === memory.turn && load(), 500);
      return;
    }
    memory.working = "";
    memory.view = view;
    memory.page = view.page || 0;
    paint();
    if (memory.followed !== memory.name) {
      memory.followed = memory.name;
      follow();
    }
  }

  function paint() {
    const view = memory.view,
      empty = !view.total && !view.trouble && !view.scanning;
    keepingPlace(() =>
      root().replaceChildren(
        el(
          "div",
          {
            class: "at-dataset",
            "data-name": view.name,
            ondragover: hover,
            ondragleave: leave,
            ondrop: (event) => drop(event, view),
            oncarried: (event) => addCarried(view, event.detail),
          },
          dropArea(view, empty),
          el(
            "div",
            { class: "at-note", "aria-live": "polite" },
            view.trouble ? notice(view.trouble, "bad") : null,
          ),
          trashBar(),
          messages(),
          summary(view),
          el("div", { class: "at-job-place" }),
          view.total ? tools(view) : null,
          filterBar(view),
          el(
            "div",
            { class: "at-grid" },
            view.cards.map((card) => cardOf(view, card)),
          ),
          pager(view),
        ),
      ),
    );
    drawJob();
  }

  function hover(event) {
    event.preventDefault();
    event.currentTarget.classList.add("at-over");
  }
  function leave(event) {
    if (!event.currentTarget.contains(event.relatedTarget))
      event.currentTarget.classList.remove("at-over");
  }

  function dropArea(view, empty) {
    const files = el("input", {
      type: "file",
      multiple: true,
      hidden: true,
      id: "dataset-files",
      accept: "image/*,.heic,.heif,.avif,.txt,.caption,.jsonl,.zip",
      onchange: (e) =>
        add(
          view,
          [...e.target.files].map((file) => [file, file.name]),
        ),
    });
    const folder = el("input", {
      type: "file",
      webkitdirectory: true,
      hidden: true,
      id: "dataset-folder",
      onchange: (e) =>
        add(
          view,
          [...e.target.files].map((file) => [file, file.webkitRelativePath || file.name]),
        ),
    });
    const choose = el(
      "div",
      { class: "at-row" },
      button("Add images", () => files.click(), empty ? "at-primary" : ""),
      button("Add a folder", () => folder.click()),
    );
    const examples =
      (view.examples || []).length && empty
        ? el(
            "div",
            { class: "at-row at-examples" },
            el("span", {}, "Or try an example:"),
            view.examples.map((example) =>
              button(example.title, () => addExample(view, example.id)),
            ),
          )
        : null;
    return el(
      "section",
      { class: `at-drop ${empty ? "at-roomy" : ""}`, "aria-label": "Add images" },
      files,
      folder,
      el(
        "div",
        {},
        el("strong", {}, empty ? `No images in “${view.name}” yet` : "Add more"),
        el(
          "p",
          {},
          empty
            ? "Drop 10 to 30 images of one subject or one style anywhere here. Sharp, varied images matter more than many."
            : "Drop images, captions, masks, folders or a .zip anywhere here.",
        ),
      ),
      choose,
      examples,
      el("p", { class: "at-working", role: "status" }, memory.working),
    );
  }

  function working(text) {
    memory.working = text;
    const place = root().querySelector(".at-working");
    if (place) place.textContent = text;
  }

  async function add(view, files) {
    if (!files.length) return;
    memory.messages = [];
    const arrived = [],
      token = Math.random().toString(36).slice(2);
    let next = 0;
    const lane = async () => {
      while (next < files.length) {
        const place = next++,
          [file, name] = files[place];
        try {
          // Gradio keeps files of one content and name once; this name no other upload has, in this window or another.
          const { path } = await upload(new File([file], `${token}-${place}`));
          arrived.push({ path, name });
        } catch {
          memory.messages.push({
            file: name,
            level: "error",
            text: "Upload failed. The file may be too large, or the disk may be full.",
          });
        }
        working(`Uploading ${arrived.length} of ${files.length}`);
      }
    };
    await Promise.all([lane(), lane(), lane(), lane()]); // four at once keep the server busy without blocking it
    working("Checking the images");
    const answer = await ask("add_files", { dataset: view.name, files: arrived }, (text) =>
      memory.messages.push({ file: "", level: "error", text }),
    );
    working("");
    memory.messages.push(...(answer.messages || []));
    changed(answer.name || view.name);
  }

  async function addExample(view, example) {
    working("Copying the example");
    const answer = await ask("add_example", { example }, (text) => {
      memory.messages = [{ file: "", level: "error", text }];
    });
    working("");
    changed(answer.name || view.name);
  }

  function drop(event, view) {
    event.preventDefault();
    event.currentTarget.classList.remove("at-over");
    addCarried(view, carried(event.dataTransfer));
  }

  async function addCarried(view, { entries, files }) {
    add(
      view,
      entries.some((entry) => entry.isDirectory)
        ? (await Promise.all(entries.map(walk))).flat()
        : files.map((file) => [file, file.name]),
    );
  }

  async function walk(entry) {
    if (entry.isFile)
      return [
        [
          await new Promise((done, fail) => entry.file(done, fail)),
          entry.fullPath.replace(/^\//, ""),
        ],
      ];
    const reader = entry.createReader(),
      found = [];
    for (;;) {
      // a reader gives at most 100 entries at a time
      const some = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!some.length) break;
      found.push(...some);
    }
    return (await Promise.all(found.map(walk))).flat();
  }

  /** A <details> that stays as the person left it when the tab is drawn anew. */
  function fold(key, title, ...content) {
    return el(
      "details",
      {
        class: `at-findings at-fold-${key.split(":")[0]}`,
        open: memory.open.has(key),
        ontoggle: (event) => {
          if (event.target === event.currentTarget)
            memory.open[event.target.open ? "add" : "delete"](key);
        },
      },
      el("summary", {}, title),
      ...content,
    );
  }

  const findingsList = (findings) =>
    el(
      "ul",
      {},
      findings.map((finding) =>
        el(
          "li",
          { class: `at-${finding.level || "note"}` },
          finding.file ? el("b", {}, finding.file) : null,
          finding.file ? " " : "",
          finding.text,
        ),
      ),
    );

  function messages() {
    if (!memory.messages.length) return null;
    return el(
      "details",
      { class: "at-findings", open: true },
      el("summary", {}, `Last import: ${plural(memory.messages.length, "issue")}`),
      findingsList(memory.messages.slice(0, 200)),
    );
  }

  // What the doctor says

  function summary(view) {
    const place = el("div", { class: "at-summary" });
    if (!view.total && !view.groups.length && !view.undo) return place;
    place.append(
      el(
        "div",
        { class: "at-row" },
        pill(plural(view.total, "image")),
        view.total
          ? pill(
              view.bare ? `${view.bare} without caption` : "all captioned",
              view.bare ? "warn" : "good",
            )
          : null,
        view.left_out ? pill(`${view.left_out} left out`, "bad") : null,
        undoButton(view),
        view.total
          ? button("Go to training", () => trigger("go_train"), "at-primary at-push")
          : null,
      ),
    );
    if (view.verdict) place.append(el("p", { class: "at-verdict" }, view.verdict));
    const remarks = view.groups.reduce((sum, group) => sum + group.count, 0);
    if (remarks)
      place.append(
        fold(
          "doctor",
          `${plural(remarks, "issue")} in this dataset`,
          el(
            "div",
            { class: "at-groups" },
            view.groups.map((group) => groupOf(view, group)),
          ),
        ),
      );
    return place;
  }

  function undoButton(view) {
    return el(
      "span",
      { class: "at-undo" },
      view.undo
        ? button(
            `Undo: ${view.undo}`,
            async () => {
              const answer = await call("undo");
              if (answer.error) return;
              await load();
              if (answer.kept.length)
                say(`Not undone, because these files changed since: ${answer.kept.join(", ")}.`);
            },
            "at-small",
          )
        : null,
    );
  }

  function setUndo(label) {
    memory.edits++;
    memory.view.undo = label;
    const place = root().querySelector(".at-undo");
    if (place) place.replaceWith(undoButton(memory.view));
  }

  function groupOf(view, group) {
    const cure = (name, file) => async (event) => {
      event.target.disabled = true;
      const answer = await call("cure", { kind: group.kind, cure: name, file });
      if (answer.error) event.target.disabled = false;
      else load();
    };
    const cures = (file) =>
      group.cures.map((each) =>
        button(
          file === undefined && group.count > 1 ? `${each.label} (all ${group.count})` : each.label,
          cure(each.name, file),
          "at-small",
        ),
      );
    const isOnPictures =
      group.kind &&
      group.level !== "error" &&
      !["shared-tag", "mixed-sizes", "orphan"].includes(group.kind);
    return el(
      "section",
      { class: `at-group at-${group.level}`, "data-kind": group.kind },
      el(
        "div",
        { class: "at-row" },
        el("b", {}, group.title),
        group.count > 1 ? pill(group.count, "quiet") : null,
        el("span", { class: "at-push" }),
        isOnPictures
          ? button("Show", () => filterBy({ kind: group.kind, title: group.title }), "at-small")
          : null,
        cures(),
      ),
      el(
        "p",
        { class: "at-hint" },
        el("span", { class: "at-file-name" }, group.files[0].file),
        " ",
        group.files[0].text,
      ),
      group.count > 1
        ? fold(
            `group:${group.kind}`,
            "Show all files",
            el(
              "ul",
              {},
              group.files.map((finding) =>
                el(
                  "li",
                  {},
                  el("b", {}, finding.file),
                  " ",
                  finding.text,
                  el("span", { class: "at-row" }, cures(finding.file)),
                ),
              ),
            ),
            group.count > group.files.length
              ? el("p", { class: "at-hint" }, `and ${group.count - group.files.length} more`)
              : null,
          )
        : null,
    );
  }

  // Which pictures are shown

  function filterBy(filter) {
    clearTimeout(memory.timers.get("search"));
    memory.filter = filter;
    memory.page = 0;
    load({ turn: true });
  }

  function filterBar(view) {
    if (!view.total) return null;
    const text = memory.filter
      ? memory.filter.title || (memory.filter.tag && `tag “${memory.filter.tag}”`)
      : "";
    const find = () =>
      whenQuiet("search", () => filterBy(search.value ? { text: search.value } : null), 300);
    const search = el("input", {
      type: "search",
      class: "at-search",
      placeholder: "Search names and captions",
      "aria-label": "Search names and captions",
      value: (memory.filter && memory.filter.text) || "",
      oninput: find,
    });
    search.edited = () => true;
    return el(
      "div",
      { class: "at-row at-filter" },
      view.total > 12 || memory.filter ? search : null,
      text ? el("span", { class: "at-pill at-quiet" }, text) : null,
      memory.filter ? el("span", { class: "at-hint" }, `${view.matching} of ${view.total}`) : null,
      memory.filter ? button("Show all", () => filterBy(null), "at-small") : null,
    );
  }

  function pager(view) {
    if (!(view.pages > 1)) return null;
    const go = (page) => {
      memory.page = page;
      load({ turn: true }).then(() => root().querySelector(".at-filter").scrollIntoView());
    };
    return el(
      "nav",
      { class: "at-row at-pager", "aria-label": "Pages" },
      button("← Previous", () => go(view.page - 1), view.page ? "" : "at-off"),
      el("span", {}, `Page ${view.page + 1} of ${view.pages}`),
      button("Next →", () => go(view.page + 1), view.page + 1 < view.pages ? "" : "at-off"),
    );
  }

  // One picture

  /** The caption box of a card, in the grid or in the dialog: saves by itself. */
  function captionBox(view, card, extra = {}) {
    const saved = el(
      "span",
      { class: "at-saved", role: "status" },
      memory.savedFile === card.file ? "saved" : "",
    );
    const tokens = el("span", { class: "at-tokens" });
    const count = () => {
      tokens.textContent =
        card.tokens > view.limit
          ? `${card.tokens} of ${view.limit} tokens`
          : plural(card.tokens, "token");
      tokens.classList.toggle("at-long", card.tokens > view.limit);
    };
    const box = el("textarea", {
      rows: 3,
      "aria-label": `Caption of ${card.file}`,
      placeholder: "Describe the image",
      spellcheck: "true",
      oninput: () => {
        box.unsaved = true;
        saved.textContent = "…";
        whenQuiet(card.file, save, 700);
      },
      onblur: () => save(),
      ...extra,
    });
    box.value = card.caption;
    box.edited = () => box.value !== card.caption;
    box.send = () =>
      sendAndForget("save_caption", {
        dataset: view.name,
        settings,
        file: card.file,
        caption: box.value,
      });
    const save = async () => {
      clearTimeout(memory.timers.get(card.file));
      const text = box.value;
      if (text === card.caption) {
        box.unsaved = false;
        if (saved.textContent === "…") saved.textContent = "saved";
        return;
      }
      const answer = await call("save_caption", { file: card.file, caption: text }, () => {
        saved.replaceChildren(
          el("button", { type: "button", class: "at-retry", onclick: save }, "not saved – retry"),
        );
      });
      if (answer.error) return;
      if (!card.caption.trim() !== !text.trim()) memory.view.bare += text.trim() ? -1 : 1;
      card.caption = text;
      card.tokens = answer.tokens;
      box.unsaved = box.value !== text;
      memory.savedFile = card.file;
      count();
      saved.textContent = box.value === text ? "saved" : "…";
      setUndo(answer.undo);
      if (!box.isConnected) load({ turn: true }); // drawn anew meanwhile, perhaps with the caption of before
      refreshLater();
    };
    count();
    return { box, saved, tokens, save };
  }

  // What is typed and not saved yet is sent when the page is hidden or about to be left. The browser then asks, which gives it the time to arrive.
  const unsaved = () =>
    [...document.querySelectorAll(".atelier textarea, .at-paint")].filter((node) => node.unsaved);
  window.addEventListener("beforeunload", (event) => {
    if (unsaved().length) event.preventDefault();
  });
  for (const type of ["visibilitychange", "beforeunload"])
    window.addEventListener(type, () => {
      for (const node of unsaved()) node.send?.();
    });

  /** Calls a server function by a request that outlives the page, which Gradio's own do not. */
  function sendAndForget(name, data) {
    const view = window.gradio_config.components.find(
      (each) => each.props.elem_id === "dataset-view",
    );
    fetch("/gradio_api/component_server", {
      method: "POST",
      keepalive: true,
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ data, component_id: view.id, fn_name: name, session_hash: "leaving" }),
    }).catch(() => {});
  }

  function cardOf(view, card) {
    const move = (event, step) => {
      event.preventDefault();
      const all = [...root().querySelectorAll(".at-card textarea")],
        next = all[all.indexOf(event.target) + step];
      if (next) next.focus();
      else if (view.pages > 1) {
        memory.page = (view.page + step + view.pages) % view.pages;
        load({ turn: true }).then(() =>
          [...root().querySelectorAll(".at-card textarea")].at(step > 0 ? 0 : -1).focus(),
        );
      } else (step > 0 ? all[0] : all.at(-1)).focus();
    };
    const { box, saved, tokens } = captionBox(view, card, {
      onkeydown: (event) => {
        if ((event.key === "Enter" && event.ctrlKey) || (event.key === "ArrowDown" && event.altKey))
          move(event, 1);
        if (event.key === "ArrowUp" && event.altKey) move(event, -1);
      },
    });
    const remove = async () => {
      const answer = await call("remove_picture", { file: card.file });
      if (!answer.error) load();
    };
    return el(
      "figure",
      { class: "at-card", "data-file": card.file },
      el(
        "div",
        { class: "at-picture" },
        el(
          "button",
          {
            type: "button",
            class: "at-open",
            "aria-label": `Crop and mask of ${card.file}`,
            title: "Crop and mask",
            onclick: () => openImage(view, card),
          },
          el("img", { src: card.src, alt: card.caption || card.file, loading: "lazy" }),
          cropOverlay(card),
        ),
        card.mask ? el("span", { class: "at-badge" }, "mask") : null,
        card.repeats > 1 ? el("span", { class: "at-badge at-right" }, `× ${card.repeats}`) : null,
        el(
          "button",
          {
            type: "button",
            class: "at-remove",
            title: "Remove from the dataset",
            "aria-label": `Remove ${card.file}`,
            onclick: remove,
          },
          "✕",
        ),
      ),
      box,
      el(
        "figcaption",
        {},
        el("span", { class: "at-file", title: `${card.file}, ${card.size}` }, card.file),
        tokens,
        saved,
      ),
    );
  }

  /** The part of the picture that is trained on, over a square thumbnail; nothing where it is all of it. */
  function cropOverlay(card) {
    const [left, top, right, bottom] = card.box;
    if (right - left > 0.995 && bottom - top > 0.995) return null;
    const width = Math.min(1, card.ratio),
      height = Math.min(1, 1 / card.ratio);
    const at = (x, y, w, h) =>
      `left:${100 * x}%;top:${100 * y}%;width:${100 * w}%;height:${100 * h}%`;
    return el(
      "span",
      { class: "at-area", style: at((1 - width) / 2, (1 - height) / 2, width, height) },
      el("span", { class: "at-crop", style: at(left, top, right - left, bottom - top) }),
    );
  }

  // The doctor follows an edit, where looking at the whole dataset again is cheap.
  function refreshLater() {
    clearTimeout(memory.refresh);
    if (memory.view.total > 500) return;
    memory.refresh = setTimeout(async () => {
      const mine = memory.turn,
        edits = memory.edits;
      const view = await call("view", { page: memory.page, filter: memory.filter }, () => {});
      if (view.error || view.scanning || mine !== memory.turn) return;
      if (edits !== memory.edits) return refreshLater();
      Object.assign(memory.view, {
        groups: view.groups,
        verdict: view.verdict,
        bare: view.bare,
        tags: view.tags,
        undo: view.undo,
      });
      root().querySelector(".at-summary").replaceWith(summary(memory.view));
    }, 2000);
  }

  Object.assign(context, {
    memory,
    root,
    call,
    load,
    paint,
    trigger,
    upload,
    changed,
    say,
    setUndo,
    captionBox,
    filterBy,
    fold,
  });
}
