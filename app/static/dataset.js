// The caption grid: drop target, pictures with their captions, findings. Captions save themselves.
const memory = { messages: [], working: "", removed: [], timers: new Map(), refresh: null };

drawWith((root, view) => {
  const cards = view.cards || [];
  const note = el("div", { "aria-live": "polite" });
  const say = (text) => note.replaceChildren(notice(text, "bad"));
  root.replaceChildren(el("div", { class: "at-dataset", "data-name": view.name, ondragover: hover, ondragleave: leave, ondrop: (event) => drop(event, view) },
    dropArea(view, cards.length === 0), note, messages(), summary(view), undoBar(view, say), el("div", { class: "at-grid" }, cards.map((card) => cardOf(view, card, say))),
    cards.length ? tools(view, say) : null));
});

function changed(name) { trigger("change_dataset", { name }); }

function hover(event) { event.preventDefault(); event.currentTarget.classList.add("at-over"); }
function leave(event) { if (!event.currentTarget.contains(event.relatedTarget)) event.currentTarget.classList.remove("at-over"); }

function dropArea(view, empty) {
  const files = el("input", { type: "file", multiple: true, hidden: true, id: "dataset-files", accept: "image/*,.heic,.heif,.avif,.txt,.caption,.jsonl,.zip", onchange: (e) => add(view, [...e.target.files].map((file) => [file, file.name])) });
  const folder = el("input", { type: "file", webkitdirectory: true, hidden: true, id: "dataset-folder", onchange: (e) => add(view, [...e.target.files].map((file) => [file, file.webkitRelativePath || file.name])) });
  const choose = el("div", { class: "at-row" }, button("Add pictures", () => files.click(), empty ? "at-primary" : ""), button("Add a folder", () => folder.click()));
  const examples = (view.examples || []).length && empty
    ? el("div", { class: "at-row at-examples" }, el("span", {}, "Or try an example:"), view.examples.map((example) => button(example.title, () => addExample(view, example.id)))) : null;
  return el("section", { class: `at-drop ${empty ? "at-roomy" : ""}`, "aria-label": "Add pictures" }, files, folder,
    el("div", {}, el("strong", {}, empty ? `No pictures in “${view.name}” yet` : "Add more"),
      el("p", {}, empty ? "Drop 10 to 30 pictures of one subject or one style anywhere here. Sharp, varied pictures matter more than many."
        : "Drop pictures, captions, folders or a .zip anywhere here.")),
    choose, examples, el("p", { class: "at-working", role: "status" }, memory.working));
}

function working(text) {
  memory.working = text;
  const place = root().querySelector(".at-working");
  if (place) place.textContent = text;
}

async function add(view, files) {
  if (!files.length) return;
  memory.messages = [];
  const arrived = [];
  let next = 0;
  const lane = async () => {
    while (next < files.length) {
      const [file, name] = files[next++];
      try {
        const { path } = await upload(file);
        arrived.push({ path, name });
      } catch {
        memory.messages.push({ file: name, level: "error", text: "Could not be uploaded; it may be too large, or the disk full." });
      }
      working(`Uploading ${arrived.length} of ${files.length}`);
    }
  };
  await Promise.all([lane(), lane(), lane(), lane()]);  // four at once keep the server busy without blocking it
  working("Checking the pictures");
  const answer = await ask("add_files", { dataset: view.name, files: arrived }, (text) => memory.messages.push({ file: "", level: "error", text }));
  working("");
  memory.messages.push(...(answer.messages || []));
  changed(answer.name || view.name);
}

async function addExample(view, example) {
  working("Copying the example");
  const answer = await ask("add_example", { example }, (text) => { memory.messages = [{ file: "", level: "error", text }]; });
  working("");
  changed(answer.name || view.name);
}

async function drop(event, view) {
  event.preventDefault();
  event.currentTarget.classList.remove("at-over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  const plain = [...event.dataTransfer.files].map((file) => [file, file.name]);
  add(view, entries.some((entry) => entry.isDirectory) ? (await Promise.all(entries.map(walk))).flat() : plain);
}

async function walk(entry) {
  if (entry.isFile) return [[await new Promise((done, fail) => entry.file(done, fail)), entry.fullPath.replace(/^\//, "")]];
  const reader = entry.createReader(), found = [];
  for (;;) {  // a reader gives at most 100 entries at a time
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.map(walk))).flat();
}

function messages() {
  if (!memory.messages.length) return null;
  return findingsList(`From the last import: ${memory.messages.length} remark${memory.messages.length > 1 ? "s" : ""}`, memory.messages, true);
}

function findingsList(title, findings, open) {
  return el("details", { class: "at-findings", open }, el("summary", {}, title),
    el("ul", {}, findings.map((finding) => el("li", { class: `at-${finding.level}` }, finding.file ? el("b", {}, finding.file) : null, finding.file ? " " : "", finding.text))));
}

function summary(view) {
  const cards = view.cards || [], findings = view.findings || [];
  const place = el("div", { class: "at-summary" });
  if (!cards.length && !findings.length) return place;
  const bare = cards.filter((card) => !card.caption.trim()).length;
  const left = findings.filter((finding) => finding.level === "error").length;
  place.append(el("div", { class: "at-row" },
    pill(`${cards.length} picture${cards.length === 1 ? "" : "s"}`), cards.length ? pill(bare ? `${bare} without caption` : "all captioned", bare ? "warn" : "good") : null,
    left ? pill(`${left} left out`, "bad") : null, cards.length ? button("Go to training", () => trigger("go_train"), "at-primary at-push") : null));
  if (findings.length) place.append(findingsList(`${findings.length} remark${findings.length > 1 ? "s" : ""} about this dataset`, findings, cards.length === 0));
  return place;
}

function undoBar(view, say) {
  const bar = el("div", { class: "at-undo", role: "status" });
  const last = memory.removed[memory.removed.length - 1];
  if (last && last.dataset === view.name) {
    bar.append(el("span", {}, `${last.file} removed.`), button("Undo", async () => {
      const answer = await ask("restore_picture", last, say);
      if (!answer.error) { memory.removed.pop(); changed(view.name); }
    }));
  }
  return bar;
}

function redrawSummary(view, say) {
  root().querySelector(".at-summary").replaceWith(summary(view));
  root().querySelector(".at-undo").replaceWith(undoBar(view, say));
}

function cardOf(view, card, say) {
  const saved = el("span", { class: "at-saved", role: "status" });
  const caption = el("textarea", { rows: 3, "aria-label": `Caption of ${card.file}`, placeholder: "What is in the picture?", spellcheck: "true",
    oninput: () => { saved.textContent = "…"; clearTimeout(memory.timers.get(card.file)); memory.timers.set(card.file, setTimeout(save, 700)); },
    onblur: () => save(),
    onkeydown: (event) => {
      if (event.key !== "Enter" || !event.ctrlKey) return;
      event.preventDefault();
      const all = [...root().querySelectorAll(".at-card textarea")];
      (all[all.indexOf(event.target) + 1] || all[0]).focus();
    } });
  caption.value = card.caption;
  const save = async () => {
    clearTimeout(memory.timers.get(card.file));
    const text = caption.value;
    if (text === card.caption) { if (saved.textContent === "…") saved.textContent = ""; return; }
    const answer = await ask("save_caption", { dataset: view.name, file: card.file, caption: text }, () => {
      saved.replaceChildren(el("button", { type: "button", class: "at-retry", onclick: save }, "not saved – retry"));
    });
    if (answer.error) return;
    card.caption = text;
    saved.textContent = caption.value === text ? "saved" : "…";
    redrawSummary(view, say);
    refreshLater(view, say);
  };
  const remove = async () => {
    const answer = await ask("remove_picture", { dataset: view.name, file: card.file }, say);
    if (answer.error) return;
    memory.removed.push({ dataset: view.name, file: card.file });
    view.cards.splice(view.cards.indexOf(card), 1);
    node.remove();
    redrawSummary(view, say);
    if (!view.cards.length) changed(view.name);
  };
  const node = el("figure", { class: "at-card" },
    el("div", { class: "at-picture" }, el("img", { src: card.src, alt: card.caption || card.file, loading: "lazy" }),
      el("button", { type: "button", class: "at-remove", title: "Remove from the dataset", "aria-label": `Remove ${card.file}`, onclick: remove }, "✕")),
    caption, el("figcaption", {}, el("span", { class: "at-file", title: card.file }, card.file), el("span", { class: "at-size" }, card.size), saved));
  return node;
}

// The findings about captions follow an edit, where reading the whole dataset again is cheap.
function refreshLater(view, say) {
  clearTimeout(memory.refresh);
  if (view.cards.length > 60) return;
  memory.refresh = setTimeout(async () => {
    const answer = await ask("refresh", { dataset: view.name }, () => {});
    if (answer.error) return;
    view.findings = answer.findings;
    redrawSummary(view, say);
  }, 2000);
}

function tools(view, say) {
  const field = (label, id) => el("label", {}, el("span", {}, label), el("input", { type: "text", id }));
  const apply = async () => {
    const value = (id) => root().querySelector(id).value;
    const answer = await ask("edit_all", { dataset: view.name, find: value("#edit-find"), replace: value("#edit-replace"), front: value("#edit-front") }, say);
    if (!answer.error) changed(view.name);
  };
  const removeAll = async () => {
    if (!confirm(`Delete the dataset ${view.name} with its ${view.cards.length} pictures? This cannot be undone.`)) return;
    const answer = await ask("remove_dataset", { dataset: view.name }, say);
    if (!answer.error) changed(answer.name);
  };
  return el("details", { class: "at-tools" }, el("summary", {}, "Edit all captions, or delete the dataset"),
    el("div", { class: "at-row" }, field("Find", "edit-find"), field("Replace with", "edit-replace"), field("Put in front", "edit-front"), button("Apply to all captions", apply)),
    el("div", { class: "at-row" }, button("Delete this dataset", removeAll, "at-danger")));
}
