import assert from "node:assert/strict";
import { test } from "node:test";

import { component, settled } from "./page.js";

const { mount } = await import("../../app/static/views/dataset.js");

const CARD = {
  file: "a.png",
  src: "a.webp",
  caption: "a cat",
  tokens: 2,
  box: [0, 0, 1, 1],
  ratio: 1,
  size: "64 × 64",
};
const VIEW = { name: "cats", cards: [CARD], groups: [], total: 1, bare: 0, limit: 75, undo: "" };
const VALUE = { name: "cats", exists: true, settings: { resolution: 64 } };

/** Returns a Dataset tab whose server records the calls. */
function dataset(
  /** @type {Record<string, (data: any) => any>} */ answers = {},
  /** @type {Record<string, any>} */ gradio = {},
) {
  /** @type {[string, any][]} */
  const calls = [];
  const names = ["view", "save_caption", "add_files", "caption_status", "cure", "undo"];
  const defaults = {
    view: () => structuredClone(VIEW),
    save_caption: () => ({ tokens: 3, undo: "Changed a.png" }),
    caption_status: () => ({ state: "none", latest: [], warnings: [] }),
    add_files: () => ({ name: "cats", messages: [] }),
  };
  /** @type {Record<string, (data: any) => any>} */
  const server = {};
  for (const name of names)
    server[name] = async (data) => {
      calls.push([name, data]);
      return (answers[name] ?? /** @type {any} */ (defaults)[name] ?? (() => ({})))(data);
    };
  const page = component(VALUE, server);
  mount({ ...page.gradio, ...gradio });
  const callsOf = (/** @type {string} */ name) =>
    calls.filter(([called]) => called === name).map(([, data]) => data);
  return { ...page, callsOf };
}

const captionBox = (/** @type {HTMLElement} */ root) =>
  /** @type {HTMLTextAreaElement} */ (root.querySelector(".at-card textarea"));

test("a caption is saved when its box is left", async () => {
  const { root, callsOf } = dataset();
  await settled();
  captionBox(root).value = "a black cat";
  captionBox(root).dispatchEvent(new Event("blur"));
  await settled();
  const [saved] = callsOf("save_caption");
  assert.deepEqual([saved.file, saved.caption], ["a.png", "a black cat"]);
  assert.equal(root.querySelector(".at-saved")?.textContent, "saved");
  assert.match(root.querySelector(".at-undo")?.textContent ?? "", /Undo: Changed a.png/);
});

test("an unchanged caption is not saved", async () => {
  const { root, callsOf } = dataset();
  await settled();
  captionBox(root).dispatchEvent(new Event("blur"));
  await settled();
  assert.deepEqual(callsOf("save_caption"), []);
});

test("a caption that could not be saved offers to try again", async () => {
  let fails = true;
  const { root, callsOf } = dataset({
    save_caption: () => (fails ? { error: "The disk is full." } : { tokens: 3, undo: "" }),
  });
  await settled();
  captionBox(root).value = "a black cat";
  captionBox(root).dispatchEvent(new Event("blur"));
  await settled();
  fails = false;
  /** @type {HTMLElement} */ (root.querySelector(".at-retry")).click();
  await settled();
  assert.equal(callsOf("save_caption").length, 2);
  assert.equal(root.querySelector(".at-saved")?.textContent, "saved");
});

test("the answer to an earlier request does not replace a later one", async () => {
  /** @type {((view: any) => void)[]} */
  const waiting = [];
  const { root, send } = dataset({ view: () => new Promise((done) => waiting.push(done)) });
  await settled();
  await send(VALUE);
  waiting[1]({ ...structuredClone(VIEW), cards: [{ ...CARD, caption: "newer" }] });
  await settled();
  waiting[0]({ ...structuredClone(VIEW), cards: [{ ...CARD, caption: "older" }] });
  await settled();
  assert.equal(captionBox(root).value, "newer");
});

test("a fix is applied to all files of its issue, or to one file", async () => {
  const group = {
    kind: "animated",
    level: "warning",
    title: "Animated",
    count: 2,
    cures: [{ name: "flatten", label: "Save as PNG" }],
    files: [
      { file: "a.gif", text: "has 3 frames" },
      { file: "b.gif", text: "has 2 frames" },
    ],
  };
  const { root, byText, callsOf } = dataset({
    view: () => ({ ...structuredClone(VIEW), groups: [group] }),
  });
  await settled();
  assert.match(root.textContent ?? "", /2 issues in this dataset/);
  byText("Save as PNG (all 2)")?.click();
  await settled();
  byText("Save as PNG")?.click();
  await settled();
  assert.deepEqual(
    callsOf("cure").map(({ kind, cure, file }) => [kind, cure, file]),
    [
      ["animated", "flatten", undefined],
      ["animated", "flatten", "a.gif"],
    ],
  );
});

test("a failed upload is reported, and the other files are imported", async () => {
  const upload = async (/** @type {File} */ file) => {
    if (file.name.endsWith("-1")) throw new Error("too large");
    return { path: file.name };
  };
  const { root, events, callsOf } = dataset({}, { upload });
  await settled();
  const input = /** @type {HTMLInputElement} */ (root.querySelector("#dataset-files"));
  const files = ["good.png", "bad.png"].map((name) => new File(["x"], name));
  Object.defineProperty(input, "files", { value: files });
  input.dispatchEvent(new Event("change"));
  await settled();
  assert.deepEqual(
    callsOf("add_files")[0].files.map((/** @type {any} */ each) => each.name),
    ["good.png"],
  );
  assert.deepEqual(events, [["change_dataset", { name: "cats" }]]);
});
