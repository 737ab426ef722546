// The panel that edits the captions of many images at once, after a preview.

import { el, notice, button, plural } from "../../lib/dom.js";
import { checkbox, field } from "./fields.js";

const OPERATIONS = {
  replace: "Find and replace",
  prepend: "Add at the start",
  append: "Add at the end",
  rename: "Rename a tag",
  remove: "Remove a tag",
  sort: "Sort the tags",
  deduplicate: "Remove duplicate tags",
};

/** Returns the tag by which the gallery is filtered, or "". */
export const shownTag = (memory) => (memory.filter && memory.filter.tag) || "";

export function createEditPanel(context) {
  const { memory, call, load } = context;

  function captionsPanel() {
    const [findField, find] = field("Find", { id: "edit-find" }),
      [newField, replacement] = field("Replace with", { id: "edit-replace" }),
      [textField, text] = field("Text", { id: "edit-text" });
    const [patternTick, pattern] = checkbox("Regular expression", { id: "edit-pattern" }),
      [firstTick, first] = checkbox("Keep the first tag first", { checked: true });
    const inputsOf = {
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
          inputs.replaceChildren(...inputsOf[choice.value]);
          result.replaceChildren();
        },
      },
      Object.entries(OPERATIONS).map(([value, title]) => el("option", { value }, title)),
    );
    const request = () => ({
      operation: choice.value,
      find: find.value,
      replacement: replacement.value,
      text: text.value,
      pattern: pattern.checked,
      keep_first: first.checked,
      only: shownTag(memory),
    });
    const showError = (message) => result.replaceChildren(notice(message, "bad"));
    const preview = async () => {
      const edit = request(),
        answer = await call("preview_edit", edit, showError);
      if (answer.error) return;
      const apply = async () => {
        const done = await call("apply_edit", edit, showError);
        if (!done.error) {
          result.replaceChildren();
          load();
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
    inputs.append(...inputsOf.replace);
    return el(
      "div",
      {},
      el("div", { class: "at-row" }, el("label", {}, el("span", {}, "Change"), choice)),
      inputs,
      shownTag(memory)
        ? el("p", { class: "at-hint" }, `Only images with the tag “${shownTag(memory)}”.`)
        : null,
      el("div", { class: "at-row" }, button("Preview", preview)),
      result,
    );
  }

  return captionsPanel;
}
