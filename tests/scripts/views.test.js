import assert from "node:assert/strict";
import { test } from "node:test";

import { component, settled } from "./page.js";

const { mount: mountEstimate } = await import("../../app/static/views/estimate.js");
const { mount: mountLibrary } = await import("../../app/static/views/library.js");

const RUN = {
  name: "cat",
  label: "Finished",
  tone: "good",
  base: "models/sd15",
  actions: ["delete"],
  date: "today",
  folder: "runs/cat",
};

/** Returns the cards of this many runs. */
const runs = (/** @type {number} */ count) =>
  Array.from({ length: count }, (_, index) => ({ ...RUN, run: `${index}`, name: `run ${index}` }));

test("each check has a button that applies its fix", async () => {
  const fix = { label: "Use 64 px", changes: { "dataset.resolution": 64 } };
  const checks = [{ level: "bad", text: "Too large.", cure: fix }];
  const { gradio, root, events, byText } = component({ checks });
  mountEstimate(gradio);
  await settled();
  assert.equal(root.querySelector(".at-check")?.getAttribute("role"), "alert");
  byText("Use 64 px")?.click();
  assert.deepEqual(events, [["cure", { changes: fix.changes }]]);
});

test("a fix can change the base instead of settings", async () => {
  const checks = [{ level: "warn", text: "Other base.", cure: { label: "Use it", base: "sd1" } }];
  const { gradio, events, byText } = component({ checks });
  mountEstimate(gradio);
  await settled();
  byText("Use it")?.click();
  assert.deepEqual(events, [["take_base", { base: "sd1" }]]);
});

test("an empty library leads to the Train tab", async () => {
  const { gradio, events, byText } = component({ cards: [] });
  mountLibrary(gradio);
  await settled();
  byText("Go to training")?.click();
  assert.deepEqual(events.at(0)?.[0], "go_train");
});

test("the library shows the runs that contain every searched word", async () => {
  const { gradio, root } = component({ cards: runs(5), cache: "1 MB" });
  mountLibrary(gradio);
  await settled();
  const search = /** @type {HTMLInputElement} */ (root.querySelector("input[type=search]"));
  search.value = "SD15 3";
  search.dispatchEvent(new Event("input"));
  const names = [...root.querySelectorAll("article")].map((node) =>
    node.getAttribute("aria-label"),
  );
  assert.deepEqual(names, ["run 3"]);
});

test("a deleted run can be restored", async () => {
  /** @type {string[]} */
  const calls = [];
  const record = (/** @type {string} */ call) => {
    calls.push(call);
    return {};
  };
  const server = {
    delete: (/** @type {any} */ { run }) => record(`delete ${run}`),
    restore: (/** @type {any} */ { run }) => record(`restore ${run}`),
  };
  const { gradio, root, byText } = component({ cards: runs(1), cache: "1 MB" }, server);
  mountLibrary(gradio);
  await settled();
  byText("Delete")?.click();
  await settled();
  assert.match(root.textContent ?? "", /run 0 was deleted/);
  byText("Undo")?.click();
  await settled();
  assert.deepEqual(calls, ["delete 0", "restore 0"]);
  assert.doesNotMatch(root.textContent ?? "", /was deleted/);
});

test("new data does not redraw a card while its name is being typed", async () => {
  const { gradio, root, send } = component({ cards: runs(1), cache: "1 MB" });
  mountLibrary(gradio);
  await settled();
  const name = /** @type {HTMLInputElement} */ (root.querySelector("article input"));
  name.focus();
  name.value = "typed";
  await send({ cards: runs(2), cache: "1 MB" });
  assert.ok(name.isConnected);
  assert.equal(root.querySelectorAll("article").length, 1);
  name.blur();
  await new Promise((resolve) => setTimeout(resolve, 350));
  assert.equal(root.querySelectorAll("article").length, 2);
});

test("a thumbnail chooses the sample that is compared with the base", async () => {
  const { mount } = await import("../../app/static/views/samples.js");
  const pictures = [0, 10, 20].map((step) => ({ step, src: `${step}.webp`, leak: null }));
  const row = { prompt: "a cat", seed: 1, pictures };
  const { gradio, root } = component({ rows: [row], best: 10, likeness: [], between: null });
  mount(gradio);
  await settled();
  assert.equal(root.querySelector(".at-right")?.textContent, "Step 20", "the newest at first");
  /** @type {HTMLElement} */ (root.querySelector("[aria-label='Show ★ Step 10: a cat']")).click();
  assert.equal(root.querySelector(".at-right")?.textContent, "★ Step 10");
});

test("the preview shows two finished images with a divider, and a grid otherwise", async () => {
  const { mount } = await import("../../app/static/views/preview.js");
  const image = (/** @type {string} */ title) => ({ title, prompt: "a cat", src: `${title}.png` });
  const { gradio, root, send } = component({ pictures: [image("base"), image("adapter")] });
  mount(gradio);
  await settled();
  assert.equal(root.querySelectorAll(".at-compare").length, 1);
  await send({ pictures: [image("base"), { ...image("adapter"), src: "" }] });
  assert.equal(root.querySelectorAll(".at-compare").length, 0);
  assert.equal(root.querySelectorAll(".at-placeholder").length, 1);
});
