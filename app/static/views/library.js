// Every run as a card: searched, tagged, compared, renamed, deleted and brought back.

import { el, pill, notice, button, emptyState, zoomable, saveText } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { trigger } = gradio;
  const { root, drawWith, ask } = connect(gradio);
  const memory = {
    search: "",
    cache: "",
    chosen: [],
    compared: null,
    deleted: null,
    problem: "",
    editing: null,
    sharing: null,
    tools: {},
  };
  const FEW = 4;

  drawWith((root, view) => {
    const cards = view.cards || [];
    const again = () => drawAll(root, view, again);
    memory.chosen = memory.chosen.filter((run) => cards.some((card) => card.run === run));
    if (memory.typing && root.contains(memory.typing)) {
      memory.waiting = again;
      return;
    } // not under somebody's hands
    again();
  });

  function drawAll(root, view, again) {
    const cards = view.cards || [];
    const undo = memory.deleted
      ? el(
          "p",
          { class: "at-undo", role: "status" },
          `${memory.deleted.name} was deleted.`,
          button(
            "Undo",
            async () => {
              const answer = await ask("restore", { run: memory.deleted.run }, (text) => {
                memory.problem = text;
              });
              if (!answer.error) memory.deleted = null;
              again();
            },
            "at-small",
          ),
        )
      : null;
    if (!cards.length) {
      root.replaceChildren(
        ...[
          undo,
          emptyState(
            "Nothing trained yet",
            "Each run appears here with its samples, settings and file. Drop a finished LoRA on the page to load its settings.",
            button("Go to training", () => trigger("go_train")),
          ),
        ].filter(Boolean),
      );
      return;
    }
    const grid = el("div", { class: "at-library" });
    const words = (card) =>
      [card.given || card.name, card.trigger, card.base, card.preset, ...(card.tags || [])]
        .join(" ")
        .toLowerCase();
    const fill = () => {
      const found = cards.filter((card) =>
        memory.search
          .toLowerCase()
          .split(/\s+/)
          .every((word) => words(card).includes(word)),
      );
      grid.replaceChildren(
        ...(found.length
          ? found.map((card) => cardOf(card, again, cards))
          : [
              el(
                "p",
                { class: "at-hint", role: "status" },
                `No run matches “${memory.search}” by name, tag, trigger word or base.`,
              ),
            ]),
      );
    };
    const search =
      cards.length >= FEW || memory.search
        ? el("input", {
            type: "search",
            class: "at-search",
            placeholder: "Search by name, tag, trigger word or base",
            "aria-label": "Search the library",
            oninput: (event) => {
              memory.search = event.target.value;
              fill();
            },
          })
        : null;
    if (search) search.value = memory.search;
    root.replaceChildren(
      ...[
        undo,
        memory.problem ? notice(memory.problem, "bad") : null,
        search,
        side(again),
        grid,
        cache(view),
      ].filter(Boolean),
    );
    fill();
  }

  /** Two chosen runs next to each other. */
  function side(again) {
    const both = memory.compared;
    if (memory.chosen.length !== 2 || !both) return null;
    const close = () => {
      memory.chosen = [];
      memory.compared = null;
      again();
    };
    return el(
      "section",
      { class: "at-panel at-side", "aria-label": "Comparison" },
      el(
        "div",
        { class: "at-row" },
        el("h3", {}, `${both.runs[0].name} and ${both.runs[1].name}`),
        el("span", { class: "at-push" }),
        button("Close", close, "at-small"),
      ),
      el(
        "div",
        { class: "at-pictures at-pair" },
        both.runs.map((run) =>
          el(
            "figure",
            {},
            run.sample
              ? zoomable(run.sample, `${run.name}: ${run.prompt}`)
              : el("div", { class: "at-placeholder" }, "no sample"),
            el("figcaption", {}, `${run.name}: ${run.prompt}`),
          ),
        ),
      ),
      curves(both.runs),
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ["Setting", both.runs[0].name, both.runs[1].name].map((text) =>
              el("th", { scope: "col" }, text),
            ),
          ),
        ),
        el(
          "tbody",
          {},
          both.settings.map((field) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, field.label),
              el("td", {}, field.was || "–"),
              el("td", {}, field.now || "–"),
            ),
          ),
        ),
      ),
      both.settings.length ? null : el("p", { class: "at-hint" }, "All settings are the same."),
    );
  }

  function curves(pair) {
    const points = pair.flatMap((run) => run.loss);
    if (!points.length) return null;
    const width = 640,
      height = 180,
      most = Math.max(...points.map((point) => point[1])),
      least = Math.min(...points.map((point) => point[1])),
      last = Math.max(...points.map((point) => point[0]), 1);
    const place = ([step, loss]) =>
      `${((width * step) / last).toFixed(1)},${(8 + (height - 16) * (1 - (loss - least) / (most - least || 1))).toFixed(1)}`;
    return el(
      "figure",
      { class: "at-curve" },
      el(
        "svg",
        {
          viewBox: `0 0 ${width} ${height}`,
          role: "img",
          "aria-label": `Loss of both runs over ${last} steps, from ${most.toPrecision(2)} to ${least.toPrecision(2)}`,
        },
        pair.map((run, number) =>
          el("polyline", {
            class: number ? "at-valid" : "at-smooth",
            points: run.loss.map(place).join(" "),
          }),
        ),
      ),
      el(
        "figcaption",
        { class: "at-legend" },
        pair.map((run, number) =>
          el("span", { class: number ? "at-key-valid" : "at-key-smooth" }, run.name),
        ),
      ),
    );
  }

  async function choose(run, again) {
    memory.chosen = memory.chosen.includes(run)
      ? memory.chosen.filter((other) => other !== run)
      : [...memory.chosen, run].slice(-2);
    memory.compared = null;
    if (memory.chosen.length === 2) {
      const [first, second] = memory.chosen;
      const answer = await ask("compare", { first, second }, (text) => {
        memory.problem = text;
      });
      if (!answer.error) memory.compared = answer;
    }
    again();
    if (memory.chosen.length === 2)
      root().querySelector(":scope > .at-notice, :scope > .at-side")?.scrollIntoView(); // from a card far down it would be out of sight
  }

  function cache(view) {
    const said = el("span", {}, memory.cache);
    const clear = async () => {
      const answer = await ask("clear_cache", {}, (text) => {
        memory.cache = text;
      });
      if (answer.text) memory.cache = answer.text;
      said.textContent = memory.cache;
    };
    return el(
      "p",
      { class: "at-row at-hint at-caches" },
      `Caches: ${view.cache}. If you clear them, the next start takes longer.`,
      button("Clear caches", clear),
      said,
    );
  }

  function cardOf(card, again, cards) {
    const problem = el("p", { class: "at-notice at-bad", role: "alert" });
    const complain = (text) => {
      problem.textContent = text;
    };
    const act = (action) => ask("act", { run: card.run, action }, complain);
    const name = card.given || card.name;
    const remove = async () => {
      const answer = await ask("delete", { run: card.run }, complain);
      if (!answer.error) {
        memory.deleted = { run: card.run, name };
        again();
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
              onclick: () => choose(card.run, again),
            },
            "Compare",
          ),
          card.actions.includes("delete") ? button("Delete", remove, "at-danger") : null,
        ),
        memory.chosen.join() === card.run
          ? el("p", { class: "at-hint", role: "status" }, "Choose a second run to compare with.")
          : null,
        more(card, name, complain),
        card.file ? tools(card, name, cards, again) : null,
      ),
    );
  }

  /** Name, tags, card and Hub: what one needs seldom. */
  function more(card, name, complain) {
    const hold = {
      onfocus: (event) => {
        memory.typing = event.target;
      },
      onblur: () => {
        memory.typing = null;
        if (memory.waiting) {
          setTimeout(() => {
            if (!memory.typing) {
              memory.waiting();
              memory.waiting = null;
            }
          }, 300);
        }
      },
    };
    const named = el("input", {
      type: "text",
      value: name,
      "aria-label": `Name of ${name}`,
      maxlength: 80,
      ...hold,
    });
    const tags = el("input", {
      type: "text",
      value: (card.tags || []).join(", "),
      "aria-label": `Tags of ${name}`,
      placeholder: "tags, separated by commas",
      ...hold,
    });
    const keep = () =>
      ask("describe", { run: card.run, name: named.value, tags: tags.value.split(",") }, complain);
    const saveCard = async () => {
      const answer = await ask("model_card", { run: card.run }, complain);
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
      complain("");
      said.textContent = "Uploading…";
      const answer = await ask(
        "push",
        { run: card.run, repository: repository.value, private: true },
        complain,
      );
      said.textContent = answer.address ? `Uploaded: ${answer.address}` : "";
    };
    const said = el("span", { class: "at-hint", role: "status" });
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
      el("div", { class: "at-row at-edit" }, named, tags, button("Save", keep, "at-small")),
      card.file
        ? el(
            "div",
            { class: "at-row at-edit" },
            button("Model card", saveCard, "at-small"),
            repository,
            button("Push to the Hub", push, "at-small"),
            said,
          )
        : null,
      el("p", { class: "at-hint at-path" }, card.folder),
      card.settings
        ? el("pre", { tabindex: 0, "aria-label": `Settings of ${name}` }, card.settings)
        : null,
    );
  }

  /** The file itself: what is in it, and another one made from it. The work is done by a process of the server, which is asked how far it is. */
  function tools(card, name, cards, again) {
    const own = (memory.tools[card.run] ||= {
      dialect: "kohya",
      precision: "fp16",
      rank: 0,
      other: "",
      own_strength: 1,
      other_strength: 1,
    });
    const wait = async (job, done) => {
      for (;;) {
        const answer = await ask("tool_state", { job }, (text) => {
          own.problem = text;
        });
        if (answer.error) break;
        if (!answer.progress) {
          done(answer);
          break;
        }
        const [at, of] = answer.progress;
        if (own.busy !== (own.busy = of ? `${at} of ${of} layers` : own.busy)) again();
        await new Promise((resolve) => setTimeout(resolve, 700));
      }
      own.busy = "";
      again();
    };
    const begin = async (call, data, said, done) => {
      own.problem = "";
      own.busy = said;
      again();
      const answer = await ask(call, data, (text) => {
        own.problem = text;
        own.busy = "";
      });
      if (answer.error) again();
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
      own.facts ? keptEnergy(own.facts.ranks) : null,
      own.facts ? wishes(card, own, cards, again, make) : null,
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

  /** What is kept of the adapter at each rank: of the whole, and of the module that loses most. */
  function keptEnergy(ranks) {
    if (!ranks || ranks.length < 2) return null;
    const width = 320,
      height = 90,
      last = ranks.length - 1;
    const line = (column) =>
      ranks
        .map(
          (row, number) =>
            `${(20 + ((width - 40) * number) / last).toFixed(1)},${(8 + (height - 30) * (1 - row[column])).toFixed(1)}`,
        )
        .join(" ");
    return el(
      "figure",
      { class: "at-curve" },
      el(
        "svg",
        {
          viewBox: `0 0 ${width} ${height}`,
          role: "img",
          "aria-label": `Kept energy by rank: ${ranks.map(([rank, whole]) => `${Math.round(whole * 100)} % at ${rank}`).join(", ")}`,
        },
        el("polyline", { class: "at-smooth", points: line(1) }),
        el("polyline", { class: "at-valid", points: line(2) }),
        ranks.map(([rank], number) =>
          el(
            "text",
            {
              x: 20 + ((width - 40) * number) / last,
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

  function wishes(card, own, cards, again, make) {
    const choice = (label, key, options, number = false) => {
      const select = el(
        "select",
        {
          "aria-label": label,
          onchange: (event) => {
            own[key] = number ? Number(event.target.value) : event.target.value;
            again();
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
    const others = cards
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
}
