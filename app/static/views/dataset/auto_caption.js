// Captions by a model: the panel that starts a job, and the progress of a running job.

import { el, pill, notice, button } from "../../lib/dom.js";
import { checkbox, field } from "./fields.js";

const POLL_INTERVAL = 800; // milliseconds

/** Returns the state of a captioning job as a pill. */
function stateOf(job) {
  if (job.state === "done") return pill("Captions", "good");
  if (job.state !== "running") return pill("Captioning failed", "bad");
  if (job.loading || !job.total) return pill("Loading the model", "busy");
  return pill(`Captioning ${job.done} of ${job.total}`, "busy");
}

export function createAutoCaption(context) {
  const { memory, root, call, load } = context;

  function modelsPanel() {
    const sizes = el(
      "p",
      { class: "at-hint", role: "status" },
      "Choose a caption model, a tagger or both: a Hugging Face name or a local folder. Models are downloaded when you press Start.",
    );
    const [modelField, model] = field("Caption model", {
        id: "caption-model",
        value: "Salesforce/blip-image-captioning-base",
        list: "caption-models",
      }),
      [taggerField, tagger] = field("Tagger", {
        id: "caption-tagger",
        placeholder: "none, or SmilingWolf/wd-vit-tagger-v3",
      });
    const [prefixField, prefix] = field("Prefix"),
      [blackField, blacklist] = field("Excluded tags"),
      [sureField, threshold] = field("Tag threshold", {
        type: "number",
        min: 0,
        max: 1,
        step: 0.05,
        value: 0.35,
      });
    const [overTick, overwrite] = checkbox("Overwrite existing captions", {
      id: "caption-overwrite",
    });
    const request = () => ({
      model: model.value,
      tagger: tagger.value,
      prefix: prefix.value,
      blacklist: blacklist.value,
      threshold: threshold.value,
      overwrite: overwrite.checked,
    });
    const showStatus = (text) => {
      sizes.textContent = text;
    };
    const start = async () => {
      const answer = await call("caption_start", request(), showStatus);
      if (!answer.error) {
        memory.job = answer;
        drawJob();
        follow(true);
      }
    };
    const size = async () => {
      showStatus("Checking the download size …");
      const answer = await call("caption_size", request(), showStatus);
      if (!answer.error) showStatus(answer.text);
    };
    return el(
      "div",
      {},
      el("div", { class: "at-row" }, modelField, taggerField),
      el("div", { class: "at-row" }, prefixField, blackField, sureField),
      overTick,
      sizes,
      el(
        "div",
        { class: "at-row" },
        button("Start", start, "at-primary"),
        button("Check download size", size),
      ),
    );
  }

  /** Follows a running captioning job, even if another window or an earlier visit started it. */
  async function follow(started = false) {
    const name = memory.name,
      job = await call("caption_status", {}, () => {});
    if (job.error || name !== memory.name) return;
    const wasRunning = started || (memory.job && memory.job.state === "running");
    memory.job = job.state === "running" || wasRunning ? job : null;
    drawJob();
    if (job.state === "running") {
      for (const { file, caption } of job.latest) {
        const box = [...root().querySelectorAll(".at-card")]
          .find((card) => card.dataset.file === file)
          ?.querySelector("textarea");
        if (box && box !== document.activeElement) box.value = caption;
      }
      setTimeout(() => name === memory.name && follow(true), POLL_INTERVAL);
    } else if (wasRunning) load();
  }

  function drawJob() {
    const section = root().querySelector(".at-job-place"),
      job = memory.job;
    if (!section) return;
    if (!job) return section.replaceChildren();
    const running = job.state === "running",
      part = job.total ? (100 * job.done) / job.total : 0;
    section.replaceChildren(
      el(
        "section",
        { class: "at-panel at-job", "data-state": job.state, "aria-label": "Auto-captioning" },
        el(
          "div",
          { class: "at-row" },
          stateOf(job),
          el("span", { class: "at-push" }),
          running
            ? button("Stop", () => call("caption_stop"), "at-small at-danger")
            : button(
                "Close",
                () => {
                  memory.job = null;
                  drawJob();
                },
                "at-small",
              ),
        ),
        running
          ? el("div", { class: "at-bar" }, el("div", { style: `width:${part}%` }))
          : notice(job.message, job.state === "done" ? "good" : "bad"),
        el(
          "ul",
          { class: "at-hint" },
          job.latest.map(({ file, caption }) => el("li", {}, el("b", {}, file), " ", caption)),
          job.warnings.map((text) => el("li", {}, text)),
        ),
      ),
    );
  }

  return { modelsPanel, follow, drawJob };
}
