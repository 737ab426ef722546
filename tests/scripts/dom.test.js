import assert from "node:assert/strict";
import { test } from "node:test";

import "./page.js";
import {
  button,
  carried,
  compared,
  el,
  notice,
  plural,
  zoomable,
} from "../../app/static/lib/dom.js";

test("text becomes text nodes, never markup", () => {
  const node = el("p", {}, "<img src=x onerror=alert(1)>", "${alert(2)}");
  assert.equal(node.querySelector("img"), null);
  assert.equal(node.textContent, "<img src=x onerror=alert(1)>${alert(2)}");
});

test("missing attributes and children are left out, zero is not", () => {
  const node = el("p", { id: null, title: undefined, hidden: false }, null, undefined, false, 0);
  assert.equal(node.attributes.length, 0);
  assert.equal(node.textContent, "0");
});

test("true becomes an empty attribute", () => {
  assert.equal(el("button", { disabled: true }).getAttribute("disabled"), "");
});

test("nested arrays of children are flattened in order", () => {
  assert.equal(el("p", {}, ["a", "b"], "c").textContent, "abc");
});

test("drawings are SVG elements", () => {
  assert.equal(el("svg").namespaceURI, "http://www.w3.org/2000/svg");
  assert.equal(el("div").namespaceURI, "http://www.w3.org/1999/xhtml");
});

test("a button calls its listener and does not submit forms", () => {
  let clicks = 0;
  const node = button("Go", () => clicks++);
  node.click();
  assert.equal(clicks, 1);
  assert.equal(node.type, "button");
});

test("only errors interrupt a screen reader", () => {
  assert.equal(notice("broken", "bad").getAttribute("role"), "alert");
  assert.equal(notice("done", "good").getAttribute("role"), "status");
});

test("the divider keeps its position when it is drawn again", () => {
  const image = { src: "", alt: "", name: "Base" };
  const slider = compared(image, image, "key").querySelector("input");
  assert.equal(slider.value, "50");
  slider.value = "0";
  slider.dispatchEvent(new Event("input"));
  assert.equal(compared(image, image, "key").querySelector("input").value, "0");
  assert.equal(compared(image, image, "other key").querySelector("input").value, "50");
});

test("an image that can be enlarged has a name for screen readers", () => {
  assert.equal(zoomable("a.png", "a cat").getAttribute("aria-label"), "Enlarge: a cat");
});

test("dropped text has no entry and no file", () => {
  const items = [{ webkitGetAsEntry: () => null }, {}];
  assert.deepEqual(carried(/** @type {any} */ ({ items, files: [] })), { entries: [], files: [] });
});

test("a count of one has a singular noun", () => {
  assert.deepEqual(
    [0, 1, 2].map((count) => plural(count, "image")),
    ["0 images", "1 image", "2 images"],
  );
});
