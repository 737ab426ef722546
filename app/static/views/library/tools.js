// Tools for an adapter file: what it contains, and converting, resizing or merging it.

import { el, notice, plot } from "../../lib/dom.js";

const POLL_INTERVAL = 700; // milliseconds

export function createTools(context) {
  const { memory, ask, redraw } = context;

  /** Returns the tools of a run. A process of the server does the work, and the page polls it. */
  function tools(card, name) {
    const own = (memory.tools[card.run] ||= {
      dialect: "kohya",
      precision: "fp16",
      rank: 0,
      other: "",
      own_strength: 1,
      other_strength: 1,
    });
    const wait = async (job, finish) => {
      for (;;) {
        const answer = await ask("tool_state", { job }, (text) => {
          own.problem = text;
        });
        if (answer.error) break;
        if (!answer.progress) {
          finish(answer);
          break;
        }
        const [done, total] = answer.progress;
        const before = own.busy;
        own.busy = total ? `${done} of ${total} layers` : own.busy;
        if (own.busy !== before) redraw();
        await new Promise((resolve) => setTimeout(resolve, POLL_INTERVAL));
      }
      own.busy = "";
      redraw();
    };
    const begin = async (call, data, status, done) => {
      own.problem = "";
      own.busy = status;
      redraw();
      const answer = await ask(call, data, (text) => {
        own.problem = text;
        own.busy = "";
      });
      if (answer.error) redraw();
      else wait(answer.job, done);
    };
    const look = () =>
      begin("look_into", { run: card.run }, "Reading the file…", (answer) => {
        own.facts = answer.facts;
      });
    const make = () =>
      begin(
        "make_file",
        {
          run: card.run,
          dialect: own.dialect,
          precision: own.precision,
          rank: own.rank,
          other: own.other,
          own_strength: own.own_strength,
          other_strength: own.other_strength,
        },
        "Creating the file…",
        (answer) => {
          own.made = answer;
        },
      );
    const open = (event) => {
      own.open = event.target.open;
      if (own.open && !own.facts && !own.busy && !own.problem) look();
    };
    return el(
      "details",
      { open: own.open, ontoggle: open, class: "at-toolbench" },
      el("summary", { "aria-label": `Tools for ${name}` }, "Tools"),
      own.facts ? factsOf(own.facts) : null,
      own.facts ? energyCurve(own.facts.ranks) : null,
      own.facts ? fileForm(card, own, make) : null,
      own.busy ? el("p", { class: "at-hint", role: "status" }, own.busy) : null,
      own.problem ? notice(own.problem, "bad") : null,
      own.made
        ? el(
            "p",
            { class: "at-row", role: "status" },
            el(
              "a",
              { class: "at-button", href: own.made.file.href, download: own.made.file.name },
              `Download ${own.made.file.name}`,
            ),
            el("span", { class: "at-hint" }, own.made.file.size),
            own.made.kept
              ? el(
                  "span",
                  { class: "at-hint at-path" },
                  `keeps ${own.made.kept}; least in ${own.made.worst}`,
                )
              : null,
          )
        : null,
    );
  }

  function factsOf(facts) {
    const rows = Object.entries(facts).filter(([, value]) => typeof value === "string");
    return el(
      "table",
      { class: "at-facts-table" },
      el(
        "tbody",
        {},
        rows.map(([label, value]) =>
          el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, value)),
        ),
      ),
    );
  }

  /** Returns the energy kept at each rank, by the whole adapter and by its worst layer. */
  function energyCurve(ranks) {
    if (!ranks || ranks.length < 2) return null;
    const width = 320,
      height = 90,
      last = ranks.length - 1;
    const line = (column) =>
      ranks
        .map(
          (row, index) =>
            `${(20 + ((width - 40) * index) / last).toFixed(1)},${(8 + (height - 30) * (1 - row[column])).toFixed(1)}`,
        )
        .join(" ");
    return el(
      "figure",
      { class: "at-curve" },
      plot(
        width,
        height,
        `Kept energy by rank: ${ranks.map(([rank, whole]) => `${Math.round(whole * 100)} % at ${rank}`).join(", ")}`,
        el("polyline", { class: "at-smooth", points: line(1) }),
        el("polyline", { class: "at-valid", points: line(2) }),
        ranks.map(([rank], index) =>
          el(
            "text",
            {
              x: 20 + ((width - 40) * index) / last,
              y: height - 4,
              "text-anchor": "middle",
              "font-size": 10,
            },
            String(rank),
          ),
        ),
      ),
      el(
        "figcaption",
        { class: "at-legend" },
        el("span", { class: "at-key-smooth" }, "energy kept, whole adapter"),
        el("span", { class: "at-key-valid" }, "energy kept, worst layer"),
      ),
    );
  }

  function fileForm(card, own, make) {
    const choice = (label, key, options, number = false) => {
      const select = el(
        "select",
        {
          "aria-label": label,
          onchange: (event) => {
            own[key] = number ? Number(event.target.value) : event.target.value;
            redraw();
          },
        },
        options.map(([value, text]) =>
          el("option", { value, selected: String(own[key]) === String(value) }, text),
        ),
      );
      return el("label", {}, `${label} `, select);
    };
    const strength = (label, key) => {
      const field = el("input", {
        type: "number",
        min: -4,
        max: 4,
        step: 0.05,
        value: own[key],
        "aria-label": label,
        onchange: (event) => {
          own[key] = Number(event.target.value);
        },
      });
      return el("label", {}, `${label} `, field);
    };
    const ranks = (own.facts.ranks || []).map(([rank, whole]) => [
      rank,
      `${rank} (keeps ${(whole * 100).toFixed(1)} %)`,
    ]);
    const others = memory.view.cards
      .filter((other) => other.file && other.run !== card.run)
      .map((other) => [other.run, other.given || other.name]);
    return el(
      "div",
      { class: "at-row at-edit" },
      choice("Format", "dialect", [
        ["kohya", "kohya (A1111, ComfyUI and most others)"],
        ["diffusers", "diffusers"],
      ]),
      choice("Precision", "precision", [
        ["fp16", "fp16"],
        ["bf16", "bf16"],
        ["fp32", "fp32"],
      ]),
      choice("Rank", "rank", [[0, "unchanged"], ...ranks], true),
      others.length ? choice("Merge with", "other", [["", "none"], ...others]) : null,
      own.other ? strength("Strength of this adapter", "own_strength") : null,
      own.other ? strength("Strength of the other adapter", "other_strength") : null,
      el(
        "button",
        { type: "button", class: "at-button at-small", disabled: Boolean(own.busy), onclick: make },
        "Create file",
      ),
    );
  }

  return tools;
}
