import assert from "node:assert/strict";
import { test } from "node:test";

import { component, settled } from "./page.js";
import { mount } from "../../app/static/views/curve.js";

const EMPTY = { smooth: [], loss: [], saves: [], total: 100, best: null };

/** Returns the drawn curve for this data. */
async function draw(/** @type {Record<string, any>} */ data) {
  const { gradio, root } = component({ ...EMPTY, ...data });
  mount(gradio);
  await settled();
  return root;
}

/** Returns the points of a line as numbers. */
function points(/** @type {HTMLElement} */ root, /** @type {string} */ line) {
  const text = root.querySelector(`polyline.${line}`)?.getAttribute("points") ?? "";
  return text.split(" ").map((pair) => pair.split(",").map(Number));
}

/** Returns the labels of the loss axis. */
const scale = (/** @type {HTMLElement} */ root) =>
  [...root.querySelectorAll("text[text-anchor=end]")].map((node) => Number(node.textContent));

test("a run without losses has no curve", async () => {
  assert.equal((await draw({})).children.length, 0);
});

test("the first step is at the left, the last step of the run at the right", async () => {
  const line = /** @type {[number, number][]} */ ([
    [0, 1],
    [50, 0.5],
    [100, 0],
  ]);
  const [first, middle, last] = points(await draw({ loss: line, smooth: line }), "at-raw");
  assert.deepEqual(first, [62, 12]);
  assert.deepEqual(last, [628, 194]);
  assert.deepEqual(middle, [345, 103]);
});

test("a run at work leaves the rest of the axis empty", async () => {
  const line = [
    [0, 1],
    [25, 0],
  ];
  const [, last] = points(await draw({ loss: line, smooth: line }), "at-raw");
  assert.equal(last[0], 62 + 566 / 4);
});

test("one outlier does not flatten the curve", async () => {
  const line = Array.from({ length: 200 }, (_, step) => [step, 1 - step / 400]);
  line[10][1] = 1000;
  const root = await draw({ loss: line, smooth: line.slice(20), total: 200 });
  const [, , highest] = scale(root);
  assert.ok(highest <= 1, `the scale ends at ${highest}`);
  assert.equal(points(root, "at-raw")[10][1], 12, "the outlier is drawn at the upper edge");
});

test("a constant loss is drawn without a division by zero", async () => {
  const line = [
    [0, 0.5],
    [100, 0.5],
  ];
  for (const [x, y] of points(await draw({ loss: line, smooth: line }), "at-raw"))
    assert.ok(Number.isFinite(x) && Number.isFinite(y));
});

test("validation losses are on the scale of the curve", async () => {
  const line = [
    [0, 0.4],
    [100, 0.2],
  ];
  const validation = [
    [0, 0.3],
    [100, 0.1],
  ];
  const root = await draw({ loss: line, smooth: line, validation });
  assert.deepEqual(points(root, "at-valid")[1], [628, 194]);
  assert.equal(root.querySelectorAll("circle").length, 2);
});

test("the best save has a star", async () => {
  const line = [
    [0, 1],
    [100, 0.5],
  ];
  const root = await draw({ loss: line, smooth: line, saves: [50, 100], best: 50 });
  const marks = [...root.querySelectorAll("text[text-anchor=middle]")];
  assert.equal(marks[0].textContent, "★ 50");
  assert.match(root.textContent ?? "", /best save/);
});

test("a screen reader gets the newest loss and its step", async () => {
  const line = [
    [0, 1],
    [40, 0.25],
  ];
  const label = (await draw({ loss: line, smooth: line }))
    .querySelector("svg")
    ?.getAttribute("aria-label");
  assert.equal(label, "Loss, 0.250 at step 40");
});
