// The card of a run in the Library.

import { el, pill, notice, button, zoomable, saveText } from "../../lib/dom.js";

export function createCard(context, choose, tools) {
  const { memory, ask, trigger, redraw } = context;

  function runCard(card) {
    const problem = el("p", { class: "at-notice at-bad", role: "alert" });
    const showProblem = (text) => {
      problem.textContent = text;
    };
    const act = (action) => ask("act", { run: card.run, action }, showProblem);
    const name = card.given || card.name;
    const remove = async () => {
      const answer = await ask("delete", { run: card.run }, showProblem);
      if (!answer.error) {
        memory.deleted = { run: card.run, name };
        redraw();
      }
    };
    const fact = (label, value) => (value ? el("span", {}, el("b", {}, value), ` ${label}`) : null);
    return el(
      "article",
      { class: "at-run", "aria-label": name },
      card.sample
        ? zoomable(card.sample, `Sample of ${name}: ${card.prompt}`)
        : el("div", { class: "at-placeholder" }, "no sample"),
      el(
        "div",
        { class: "at-run-text" },
        el(
          "div",
          { class: "at-row" },
          el("h3", {}, name),
          pill(card.label, card.tone),
          card.gauge
            ? el(
                "span",
                { class: `at-pill at-zone at-zone-${card.gauge.zone}`, title: card.gauge.sentence },
                card.gauge.zone,
              )
            : null,
          (card.tags || []).map((tag) => el("span", { class: "at-tag" }, tag)),
        ),
        el(
          "p",
          { class: "at-hint" },
          [
            card.preset,
            card.base.split(/[\\/]/).pop(),
            card.steps,
            card.best ? `best at step ${card.best}` : "",
            card.file ? card.file.size : "",
          ]
            .filter(Boolean)
            .join(" · "),
        ),
        card.file
          ? el(
              "p",
              { class: "at-hint at-facts" },
              fact("trigger", card.trigger),
              fact("strength", "0.8 to 1"),
            )
          : null,
        el("p", { class: "at-hint" }, card.date),
        card.fault ? notice(card.fault, "bad") : null,
        card.report
          ? el("a", { class: "at-button", href: card.report, download: "report.txt" }, "Report")
          : null,
        problem,
        el(
          "div",
          { class: "at-row at-actions" },
          card.file
            ? el(
                "a",
                { class: "at-button at-primary", href: card.file.href, download: card.file.name },
                "Download",
              )
            : null,
          card.file?.embedding
            ? el(
                "a",
                {
                  class: "at-button",
                  href: card.file.embedding.href,
                  download: card.file.embedding.name,
                },
                "Embedding",
              )
            : null,
          card.can_preview
            ? button("Preview", () => trigger("open_preview", { run: card.run }))
            : null,
          card.actions.includes("resume")
            ? button(card.label === "Not started" ? "Start" : "Resume", () => {
                act("resume");
                trigger("go_train");
              })
            : null,
          card.settings
            ? button("Train again", () => trigger("train_again", { run: card.run }))
            : null,
          el(
            "button",
            {
              type: "button",
              class: "at-button",
              "aria-pressed": String(memory.chosen.includes(card.run)),
              onclick: () => choose(card.run),
            },
            "Compare",
          ),
          card.actions.includes("delete") ? button("Delete", remove, "at-danger") : null,
        ),
        memory.chosen.join() === card.run
          ? el("p", { class: "at-hint", role: "status" }, "Choose a second run to compare with.")
          : null,
        more(card, name, showProblem),
        card.file ? tools(card, name) : null,
      ),
    );
  }

  /** Returns the folded part of a card: name, tags, model card, Hub and settings. */
  function more(card, name, showProblem) {
    // New data does not redraw the card while a field has the focus.
    const hold = {
      onfocus: (event) => {
        memory.typing = event.target;
      },
      onblur: () => {
        memory.typing = null;
        if (memory.waiting) {
          // The focus may move to the other field of the card.
          setTimeout(() => {
            if (!memory.typing) redraw();
          }, 300);
        }
      },
    };
    const nameInput = el("input", {
      type: "text",
      value: name,
      "aria-label": `Name of ${name}`,
      maxlength: 80,
      ...hold,
    });
    const tagsInput = el("input", {
      type: "text",
      value: (card.tags || []).join(", "),
      "aria-label": `Tags of ${name}`,
      placeholder: "tags, separated by commas",
      ...hold,
    });
    const save = () =>
      ask(
        "describe",
        { run: card.run, name: nameInput.value, tags: tagsInput.value.split(",") },
        showProblem,
      );
    const saveCard = async () => {
      const answer = await ask("model_card", { run: card.run }, showProblem);
      if (answer.text) saveText("README.md", answer.text);
    };
    const repository = el("input", {
      type: "text",
      placeholder: "user/name",
      "aria-label": "Repository on the Hugging Face Hub",
      ...hold,
    });
    const push = async () => {
      if (
        !confirm(
          `Upload the adapter, its card and its samples to ${repository.value} on the Hugging Face Hub, as a private repository?`,
        )
      )
        return;
      showProblem("");
      status.textContent = "Uploading…";
      const answer = await ask(
        "push",
        { run: card.run, repository: repository.value, private: true },
        showProblem,
      );
      status.textContent = answer.address ? `Uploaded: ${answer.address}` : "";
    };
    const status = el("span", { class: "at-hint", role: "status" });
    const open = memory.opened === card.run;
    return el(
      "details",
      {
        open,
        ontoggle: (event) => {
          if (event.target.open) memory.opened = card.run;
          else if (memory.opened === card.run) memory.opened = null;
        },
      },
      el("summary", {}, "More"),
      el(
        "div",
        { class: "at-row at-edit" },
        nameInput,
        tagsInput,
        button("Save", save, "at-small"),
      ),
      card.file
        ? el(
            "div",
            { class: "at-row at-edit" },
            button("Model card", saveCard, "at-small"),
            repository,
            button("Push to the Hub", push, "at-small"),
            status,
          )
        : null,
      el("p", { class: "at-hint at-path" }, card.folder),
      card.settings
        ? el("pre", { tabindex: 0, "aria-label": `Settings of ${name}` }, card.settings)
        : null,
    );
  }

  return runCard;
}
