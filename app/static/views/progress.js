// The running or the newest run: state, progress, figures, actions, queue and log.

import { el, pill, notice, button, emptyState } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { trigger } = gradio;
  const { drawWith, ask } = connect(gradio);
  const memory = { logOpen: false, log: "", problem: "" };
  const WORDS = {
    stop: "Stop and save",
    pause: "Pause",
    continue: "Continue",
    resume: "Resume",
    save: "Save now",
    sample: "Sample now",
    repeat: "Run again",
  };
  const ORDER = ["continue", "resume", "pause", "stop", "save", "sample", "repeat"];

  drawWith((root, view) => {
    if (!view.run) {
      root.replaceChildren(
        emptyState(
          "No training yet",
          "Choose a preset and press Start training. You can close this page: training continues. Drop a finished LoRA here to load its settings.",
        ),
      );
      return;
    }
    const act = async (run, action) => {
      memory.problem = "";
      await ask("act", { run, action }, (text) => {
        memory.problem = text;
      });
      note.textContent = memory.problem;
    };
    const note = el("p", { class: "at-notice at-bad", role: "alert" }, memory.problem);
    root.replaceChildren(
      el(
        "section",
        { class: "at-panel", "aria-label": "Training" },
        el(
          "div",
          { class: "at-row" },
          pill(view.label, view.tone),
          el("strong", { class: "at-name" }, view.name),
          el("span", { class: "at-phase" }, view.phase),
          el(
            "span",
            { class: "at-percent" },
            view.share ? `${Math.floor(100 * view.share)} %` : "",
          ),
        ),
        bar(view),
        figures(view),
        view.gauge ? gauge(view.gauge) : null,
        view.ended_early ? notice(view.ended_early, "good") : null,
        view.message ? notice(view.message, "bad") : null,
        view.report
          ? el(
              "p",
              { class: "at-row at-hint" },
              el("a", { class: "at-button", href: view.report, download: "report.txt" }, "Report"),
              "Traceback, versions and settings, without tokens and home paths.",
            )
          : null,
        view.warnings.map((text) => notice(text, "warn")),
        el(
          "div",
          { class: "at-row at-actions" },
          ORDER.filter((action) => view.actions.includes(action)).map((action) =>
            button(WORDS[action], () => act(view.run, action), `at-act-${action}`),
          ),
          view.actions.includes("unqueue")
            ? button("Remove from the queue", () => act(view.run, "unqueue"))
            : null,
          view.file ? button("Preview", () => trigger("open_preview", { run: view.run })) : null,
          view.file
            ? el(
                "a",
                { class: "at-button", href: view.file.href, download: view.file.name },
                `Download (${view.file.size})`,
              )
            : null,
          view.file?.embedding
            ? el(
                "a",
                {
                  class: "at-button",
                  href: view.file.embedding.href,
                  download: view.file.embedding.name,
                },
                "Embedding",
              )
            : null,
        ),
        note,
        queue(view, act),
        log(view),
      ),
    );
  });

  function bar(view) {
    return el(
      "div",
      {
        class: `at-bar at-${view.tone}`,
        role: "progressbar",
        "aria-valuemin": 0,
        "aria-valuemax": 100,
        "aria-valuenow": Math.floor(100 * view.share),
        "aria-label": view.label,
      },
      el("div", { style: `width:${(100 * view.share).toFixed(1)}%` }),
    );
  }

  /** Returns the gauge from learning to memorising, with its explanation and suggested changes. */
  const ZONES = ["learning", "ready", "memorising"];
  function gauge(reading) {
    return el(
      "div",
      { class: `at-gauge at-zone-${reading.zone}` },
      el(
        "div",
        {
          class: "at-zones",
          role: "img",
          "aria-label": `${reading.zone}, ${Math.round(100 * reading.needle)} of 100 from learning to memorising`,
        },
        ZONES.map((zone) => el("span", { class: zone === reading.zone ? "at-lit" : "" }, zone)),
        el("i", { style: `left:${(100 * reading.needle).toFixed(1)}%` }),
      ),
      el("p", {}, reading.sentence),
      reading.changes.length
        ? el("p", { class: "at-hint" }, `For the next run: ${reading.changes.join("; ")}.`)
        : null,
    );
  }

  function figures(view) {
    const figure = (value, label) =>
      value ? el("div", {}, el("b", {}, value), el("span", {}, label)) : null;
    return el(
      "div",
      { class: "at-figures" },
      figure(view.total ? `${view.step} / ${view.total}` : "", "steps"),
      figure(view.left, "left"),
      figure(view.took, "elapsed"),
      figure(view.speed, "speed"),
      figure(view.images, "images/s"),
      figure(view.loss, "loss"),
      figure(view.validation, "validation"),
      figure(view.rate, "learning rate"),
      figure(view.memory, view.memory_of),
      figure(view.use, "in use"),
      view.details ? el("p", { class: "at-hint" }, view.details) : null,
    );
  }

  function queue(view, act) {
    if (!view.queue.length) return null;
    return el(
      "div",
      { class: "at-queue" },
      el("h3", {}, "Next in the queue"),
      el(
        "ol",
        {},
        view.queue.map((item, index) =>
          el(
            "li",
            {},
            el("span", {}, item.name),
            index
              ? el(
                  "button",
                  {
                    type: "button",
                    class: "at-button at-small",
                    "aria-label": `Move ${item.name} up`,
                    onclick: () => act(item.run, "earlier"),
                  },
                  "↑",
                )
              : null,
            el(
              "button",
              {
                type: "button",
                class: "at-button at-small",
                onclick: () => act(item.run, "unqueue"),
              },
              "Remove",
            ),
          ),
        ),
      ),
    );
  }

  function log(view) {
    const text = el("pre", { tabindex: 0 }, memory.log);
    const fill = async () => {
      const answer = await ask("read_log", { run: view.run }, (error) => {
        memory.log = error;
      });
      if (answer.text !== undefined) memory.log = answer.text || "Nothing yet.";
      text.textContent = memory.log;
    };
    const details = el(
      "details",
      {
        class: "at-log",
        open: memory.logOpen,
        ontoggle: () => {
          if (details.open && !memory.logOpen) fill();
          memory.logOpen = details.open;
        },
      },
      el("summary", {}, "Log"),
      text,
    );
    if (memory.logOpen) fill();
    return details;
  }
}
