// Counts of the dataset, the Undo button, and the issues that the checks found, each with its fixes.

import { el, pill, button, plural } from "../../lib/dom.js";

/** These issues are about the dataset as a whole, so the gallery cannot show their images. */
const KINDS_WITHOUT_IMAGES = ["shared-tag", "mixed-sizes", "orphan"];
/** A longer list would make the page slow. */
const MAX_MESSAGES = 200;

const issueList = (issues) =>
  el(
    "ul",
    {},
    issues.map((issue) =>
      el(
        "li",
        { class: `at-${issue.level || "note"}` },
        issue.file ? el("b", {}, issue.file) : null,
        issue.file ? " " : "",
        issue.text,
      ),
    ),
  );

export function createIssues(context) {
  const { memory, root, call, load, showError, trigger, filterBy } = context;

  /** Returns a <details> that stays open or closed when the tab is redrawn. */
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

  function importMessages() {
    if (!memory.messages.length) return null;
    return el(
      "details",
      { class: "at-findings", open: true },
      el("summary", {}, `Last import: ${plural(memory.messages.length, "issue")}`),
      issueList(memory.messages.slice(0, MAX_MESSAGES)),
    );
  }

  function summary(view) {
    const section = el("div", { class: "at-summary" });
    if (!view.total && !view.groups.length && !view.undo) return section;
    section.append(
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
    if (view.verdict) section.append(el("p", { class: "at-verdict" }, view.verdict));
    const issues = view.groups.reduce((sum, group) => sum + group.count, 0);
    if (issues)
      section.append(
        fold(
          "doctor",
          `${plural(issues, "issue")} in this dataset`,
          el(
            "div",
            { class: "at-groups" },
            view.groups.map((group) => groupOf(view, group)),
          ),
        ),
      );
    return section;
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
                showError(
                  `Not undone, because these files changed since: ${answer.kept.join(", ")}.`,
                );
            },
            "at-small",
          )
        : null,
    );
  }

  /** Shows the label of the newest change on the Undo button, without redrawing the tab. */
  function setUndo(label) {
    memory.edits++;
    memory.view.undo = label;
    const current = root().querySelector(".at-undo");
    if (current) current.replaceWith(undoButton(memory.view));
  }

  /** Returns all issues of one kind, with fixes for all of them and for each file. */
  function groupOf(view, group) {
    const fix = (name, file) => async (event) => {
      event.target.disabled = true;
      const answer = await call("cure", { kind: group.kind, cure: name, file });
      if (answer.error) event.target.disabled = false;
      else load();
    };
    const fixButtons = (file) =>
      group.cures.map((each) =>
        button(
          file === undefined && group.count > 1 ? `${each.label} (all ${group.count})` : each.label,
          fix(each.name, file),
          "at-small",
        ),
      );
    const isAboutImages =
      group.kind && group.level !== "error" && !KINDS_WITHOUT_IMAGES.includes(group.kind);
    return el(
      "section",
      { class: `at-group at-${group.level}`, "data-kind": group.kind },
      el(
        "div",
        { class: "at-row" },
        el("b", {}, group.title),
        group.count > 1 ? pill(group.count, "quiet") : null,
        el("span", { class: "at-push" }),
        isAboutImages
          ? button("Show", () => filterBy({ kind: group.kind, title: group.title }), "at-small")
          : null,
        fixButtons(),
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
              group.files.map((issue) =>
                el(
                  "li",
                  {},
                  el("b", {}, issue.file),
                  " ",
                  issue.text,
                  el("span", { class: "at-row" }, fixButtons(issue.file)),
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

  return { fold, importMessages, summary, setUndo };
}
