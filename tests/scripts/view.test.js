import assert from "node:assert/strict";
import { test } from "node:test";

import { component, point, settled } from "./page.js";
import { el } from "../../app/static/lib/dom.js";
import { connect } from "../../app/static/lib/view.js";

/** Returns a view that draws a counter button, a text box and the text of its data. */
function counter(/** @type {any} */ value) {
  const page = component(value);
  const { drawWith } = connect(page.gradio);
  const drawn = { count: 0 };
  drawWith((root, data) => {
    drawn.count++;
    const box = el("input", { type: "text", "aria-label": "Note" });
    box.edited = () => data.keeps;
    root.replaceChildren(el("button", { id: "press" }, "Press"), box, el("p", {}, data.text));
  });
  return { ...page, drawn };
}

test("a view without data stays empty", async () => {
  const { root, drawn } = counter(null);
  await settled();
  assert.equal(drawn.count, 0);
  assert.equal(root.textContent, "");
});

test("the first data is drawn, and each later one", async () => {
  const { root, send } = counter({ text: "one" });
  await settled();
  assert.equal(root.querySelector("p")?.textContent, "one");
  await send({ text: "two" });
  assert.equal(root.querySelector("p")?.textContent, "two");
});

test("the first drawing waits until mount has returned", async () => {
  const { drawn } = counter({ text: "one" });
  assert.equal(drawn.count, 0);
  await settled();
  assert.equal(drawn.count, 1);
});

test("data that arrives during a press is drawn after its click", async () => {
  const { root, send, drawn } = counter({ text: "one" });
  await settled();
  const pressed = /** @type {HTMLElement} */ (root.querySelector("#press"));
  point(pressed, "pointerdown");
  await send({ text: "two" });
  await send({ text: "three" });
  assert.equal(drawn.count, 1);
  assert.ok(pressed.isConnected, "the button under the pointer is replaced");
  point(pressed, "pointerup");
  assert.ok(pressed.isConnected, "the button is replaced before the click event");
  await settled();
  assert.equal(drawn.count, 2);
  assert.equal(root.querySelector("p")?.textContent, "three");
});

test("a press without new data draws nothing", async () => {
  const { root, drawn } = counter({ text: "one" });
  await settled();
  point(root, "pointerdown");
  point(window, "pointerup");
  await settled();
  assert.equal(drawn.count, 1);
});

test("a cancelled press does not stop drawing", async () => {
  const { root, send } = counter({ text: "one" });
  await settled();
  point(root, "pointerdown");
  point(window, "pointercancel");
  await settled();
  await send({ text: "two" });
  assert.equal(root.querySelector("p")?.textContent, "two");
});

test("the focus moves to the new control of the same name", async () => {
  const { root, send } = counter({ text: "one" });
  await settled();
  /** @type {HTMLElement} */ (root.querySelector("#press")).focus();
  await send({ text: "two" });
  assert.equal(document.activeElement, root.querySelector("#press"));
});

test("the focus outside of the view is left alone", async () => {
  const { send } = counter({ text: "one" });
  await settled();
  const outside = document.body.appendChild(el("button", {}, "Outside"));
  outside.focus();
  await send({ text: "two" });
  assert.equal(document.activeElement, outside);
});

for (const keeps of [true, false])
  test(`text that is being typed is ${keeps ? "kept" : "replaced"} if edited() is ${keeps}`, async () => {
    const { root, send } = counter({ text: "one", keeps });
    await settled();
    const box = /** @type {HTMLInputElement} */ (root.querySelector("input"));
    box.focus();
    box.value = "typed";
    box.setSelectionRange(2, 3);
    await send({ text: "two", keeps });
    const after = /** @type {HTMLInputElement} */ (document.activeElement);
    assert.notEqual(after, box);
    assert.equal(after.value, keeps ? "typed" : "");
    if (keeps) assert.deepEqual([after.selectionStart, after.selectionEnd], [2, 3]);
  });

test("ask returns the answer of the server", async () => {
  const { gradio } = component({}, { double: (data) => ({ result: 2 * data }) });
  const answer = await connect(gradio).ask("double", 4, assert.fail);
  assert.deepEqual(answer, { result: 8 });
});

test("ask reports the error of the server", async () => {
  /** @type {string[]} */
  const errors = [];
  const { gradio } = component({}, { refuse: () => ({ error: "There is no such run." }) });
  const answer = await connect(gradio).ask("refuse", {}, (text) => errors.push(text));
  assert.deepEqual(errors, ["There is no such run."]);
  assert.equal(answer.error, "There is no such run.");
});

test("ask reports a lost connection", async () => {
  /** @type {string[]} */
  const errors = [];
  const { gradio } = component({}, { lost: () => Promise.reject(new Error("network")) });
  const answer = await connect(gradio).ask("lost", {}, (text) => errors.push(text));
  assert.match(errors[0], /did not answer/);
  assert.equal(answer.error, errors[0]);
});
