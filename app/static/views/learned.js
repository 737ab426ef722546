// The finished adapter: how much it changes each block, how much of its rank it uses, and a button
// that makes a smaller file.

import { el, notice, plot } from "../lib/dom.js";
import { connect } from "../lib/view.js";

export function mount(gradio) {
  const { drawWith, ask } = connect(gradio);
  const memory = { run: "", busy: "", problem: "", made: null };

  drawWith((root, view) => {
    if (!view.run || !view.blocks.length) {
      root.replaceChildren();
      memory.run = "";
      return;
    }
    if (memory.run !== view.run)
      Object.assign(memory, { run: view.run, busy: "", problem: "", made: null });
    const again = () =>
      root.replaceChildren(
        el(
          "section",
          { class: "at-panel at-learned", "aria-label": "What it learned" },
          el("h3", {}, "Changes by block"),
          blockBars(view.blocks),
          view.rank > 1
            ? [
                el("h3", {}, "Used rank"),
                spectrum(view),
                smaller(view, again),
                byModule(view.modules),
              ]
            : null,
        ),
      );
    again();
  });

  /** Returns a bar for each block from input to output, then for the text encoders. */
  function blockBars(blocks) {
    const most = Math.max(...blocks.map(([, norm]) => norm), 1e-12),
      width = 640,
      low = 112;
    // On a phone more than 8 horizontal names do not fit.
    const slant = blocks.length > 8,
      height = slant ? 185 : 150,
      inset = slant ? 30 : 0,
      wide = (width - inset) / blocks.length;
    const strongest = blocks.reduce((one, other) => (other[1] > one[1] ? other : one));
    return el(
      "figure",
      { class: "at-curve" },
      plot(
        width,
        height,
        `Size of the change by block: ${blocks.map(([name, norm]) => `${name} ${norm.toPrecision(2)}`).join(", ")}`,
        el("line", { class: "at-rule", x1: 0, x2: width, y1: low, y2: low }),
        blocks.map(([name, norm], index) => {
          const x = inset + wide * (index + 0.5),
            top = low - (100 * norm) / most;
          return el(
            "g",
            {},
            el(
              "line",
              {
                class: name.startsWith("text") ? "at-bar-text" : "at-bar-block",
                x1: x,
                x2: x,
                y1: low,
                y2: Math.min(top, low - 1),
                "stroke-width": Math.min(44, 0.7 * wide),
              },
              el("title", {}, `${name}: ${norm.toPrecision(3)}`),
            ),
            el(
              "text",
              slant
                ? {
                    x,
                    y: low + 12,
                    "text-anchor": "end",
                    transform: `rotate(-45 ${x} ${low + 12})`,
                  }
                : { x, y: low + 20, "text-anchor": "middle" },
              name,
            ),
          );
        }),
      ),
      el(
        "figcaption",
        { class: "at-hint" },
        `Size of the change (norm of delta W) in each block, from input to output. Largest in ${strongest[0]}.`,
      ),
    );
  }

  /** Returns the curve of the energy kept at each rank. */
  function spectrum(view) {
    const width = 640,
      height = 120,
      left = 62,
      low = 92;
    let sum = 0;
    const kept = [[0, 0], ...view.spectrum.map((share, index) => [index + 1, (sum += share)])];
    const x = (rank) => left + ((width - left - 16) * rank) / view.rank,
      y = (share) => low - 80 * share;
    const marks = [...new Set([view.enough["95"], view.enough["99"], view.rank])].filter(
      (rank, index, all) => !index || x(rank) - x(all[index - 1]) > 30,
    );
    return el(
      "figure",
      { class: "at-curve" },
      plot(
        width,
        height,
        `Rank ${view.enough["95"]} keeps 95 %, rank ${view.enough["99"]} keeps 99 % of the energy`,
        [0.5, 1].map((share) =>
          el(
            "g",
            {},
            el("line", { class: "at-rule", x1: left, x2: width - 16, y1: y(share), y2: y(share) }),
            el("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`),
          ),
        ),
        el("polyline", {
          class: "at-smooth",
          points: kept
            .map(([rank, share]) => `${x(rank).toFixed(1)},${y(share).toFixed(1)}`)
            .join(" "),
        }),
        ["95", "99"].map((share) =>
          el(
            "circle",
            {
              class: "at-valid-dot",
              cx: x(view.enough[share]),
              cy: y(kept[view.enough[share]][1]),
              r: 4,
            },
            el("title", {}, `${share} % at rank ${view.enough[share]}`),
          ),
        ),
        marks.map((rank) =>
          el("text", { x: x(rank), y: height - 8, "text-anchor": "middle" }, String(rank)),
        ),
      ),
      el(
        "figcaption",
        { class: "at-hint" },
        `Energy (squared singular values) kept at each rank, of ${view.rank}. Rank ${view.enough["95"]} keeps 95 %, rank ${view.enough["99"]} keeps 99 %.`,
      ),
    );
  }

  function smaller(view, again) {
    const rank = view.enough["99"];
    if (rank >= view.rank)
      return el(
        "p",
        { class: "at-hint" },
        "The adapter uses its full rank. A smaller file would lose detail.",
      );
    const make = async () => {
      Object.assign(memory, { busy: "Creating the file…", problem: "", made: null });
      again();
      let answer = await ask("shrink", { run: view.run, rank }, (text) => {
        memory.problem = text;
      });
      for (const job = answer.job; !answer.error; ) {
        answer = await ask("shrunk", { job }, (text) => {
          memory.problem = text;
        });
        if (!answer.progress) break;
        await new Promise((resolve) => setTimeout(resolve, 700));
      }
      // Another run may be shown by now.
      if (memory.run !== view.run) return;
      memory.busy = "";
      if (!answer.error) memory.made = answer;
      again();
    };
    return el(
      "div",
      { class: "at-row" },
      el(
        "button",
        { type: "button", class: "at-button", disabled: Boolean(memory.busy), onclick: make },
        `Resize to rank ${rank}`,
      ),
      memory.busy ? el("span", { class: "at-hint", role: "status" }, memory.busy) : null,
      memory.problem ? notice(memory.problem, "bad") : null,
      memory.made
        ? el(
            "a",
            { class: "at-button", href: memory.made.file.href, download: memory.made.file.name },
            `Download ${memory.made.file.name} (${memory.made.file.size})`,
          )
        : null,
    );
  }

  function byModule(modules) {
    return el(
      "details",
      {
        open: memory.open,
        ontoggle: (event) => {
          memory.open = event.target.open;
        },
      },
      el("summary", {}, "Layer by layer"),
      el(
        "div",
        { class: "at-by-module", tabindex: 0 },
        el(
          "table",
          {},
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              ["Layer", "rank", "95 % at", "99 % at"].map((text) =>
                el("th", { scope: "col" }, text),
              ),
            ),
          ),
          el(
            "tbody",
            {},
            modules.map(([name, ...ranks]) =>
              el(
                "tr",
                {},
                el("th", { scope: "row" }, name),
                ranks.map((rank) => el("td", {}, String(rank))),
              ),
            ),
          ),
        ),
      ),
    );
  }
}
