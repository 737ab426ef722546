// The drop area: chooses, uploads and imports images, captions, folders and zip files.

import { el, button, carried } from "../../lib/dom.js";

const ACCEPTED = "image/*,.heic,.heif,.avif,.txt,.caption,.jsonl,.zip";
/** More uploads at once would block the server, fewer would leave it idle. */
const PARALLEL_UPLOADS = 4;

/** Returns the files of a dropped file or folder, as pairs of a file and its path. */
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, fail) => entry.file(done, fail));
    return [[file, entry.fullPath.replace(/^\//, "")]];
  }
  const reader = entry.createReader();
  const entries = [];
  for (;;) {
    // A reader returns at most 100 entries at a time.
    const batch = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!batch.length) break;
    entries.push(...batch);
  }
  return (await Promise.all(entries.map(filesOf))).flat();
}

const withPaths = (files) => [...files].map((file) => [file, file.webkitRelativePath || file.name]);

export function createUpload(context) {
  const { memory, root, ask, upload, changed } = context;

  function fileInput(view, attributes) {
    return el("input", {
      type: "file",
      hidden: true,
      onchange: (event) => add(view, withPaths(event.target.files)),
      ...attributes,
    });
  }

  function dropArea(view, empty) {
    const files = fileInput(view, { id: "dataset-files", multiple: true, accept: ACCEPTED });
    const folder = fileInput(view, { id: "dataset-folder", webkitdirectory: true });
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
      el(
        "div",
        { class: "at-row" },
        button("Add images", () => files.click(), empty ? "at-primary" : ""),
        button("Add a folder", () => folder.click()),
      ),
      empty ? exampleButtons(view) : null,
      el("p", { class: "at-working", role: "status" }, memory.working),
    );
  }

  function exampleButtons(view) {
    const examples = view.examples || [];
    if (!examples.length) return null;
    return el(
      "div",
      { class: "at-row at-examples" },
      el("span", {}, "Or try an example:"),
      examples.map((example) => button(example.title, () => addExample(view, example.id))),
    );
  }

  /** Shows what the server is doing, until it is called with an empty text. */
  function showProgress(text) {
    memory.working = text;
    const line = root().querySelector(".at-working");
    if (line) line.textContent = text;
  }

  async function add(view, files) {
    if (!files.length) return;
    memory.messages = [];
    const uploaded = [];
    const token = Math.random().toString(36).slice(2);
    let next = 0;
    const uploadNext = async () => {
      while (next < files.length) {
        const index = next++;
        const [file, name] = files[index];
        try {
          // Gradio stores files with equal name and content once. The token makes each name unique.
          const { path } = await upload(new File([file], `${token}-${index}`));
          uploaded.push({ path, name });
        } catch {
          memory.messages.push({
            file: name,
            level: "error",
            text: "Upload failed. The file may be too large, or the disk may be full.",
          });
        }
        showProgress(`Uploading ${uploaded.length} of ${files.length}`);
      }
    };
    await Promise.all(Array.from({ length: PARALLEL_UPLOADS }, uploadNext));
    showProgress("Checking the images");
    const answer = await ask("add_files", { dataset: view.name, files: uploaded }, (text) =>
      memory.messages.push({ file: "", level: "error", text }),
    );
    showProgress("");
    memory.messages.push(...(answer.messages || []));
    changed(answer.name || view.name);
  }

  async function addExample(view, example) {
    showProgress("Copying the example");
    const answer = await ask("add_example", { example }, (text) => {
      memory.messages = [{ file: "", level: "error", text }];
    });
    showProgress("");
    changed(answer.name || view.name);
  }

  async function addDropped(view, { entries, files }) {
    const hasFolder = entries.some((entry) => entry.isDirectory);
    add(view, hasFolder ? (await Promise.all(entries.map(filesOf))).flat() : withPaths(files));
  }

  /** Returns the listeners that make an element accept dropped files. */
  function dropListeners(view) {
    return {
      ondragover: (event) => {
        event.preventDefault();
        event.currentTarget.classList.add("at-over");
      },
      ondragleave: (event) => {
        if (!event.currentTarget.contains(event.relatedTarget))
          event.currentTarget.classList.remove("at-over");
      },
      ondrop: (event) => {
        event.preventDefault();
        event.currentTarget.classList.remove("at-over");
        addDropped(view, carried(event.dataTransfer));
      },
      // The header passes on files that were dropped elsewhere on the page.
      oncarried: (event) => addDropped(view, event.detail),
    };
  }

  return { dropArea, dropListeners, showProgress };
}
