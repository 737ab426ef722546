"""The whole job without a page: trains the example subject on the embedded base, and reports what it learned.

What is measured are pixel statistics of pictures whose seeds, and mostly prompts, the training never saw (`embedded/score.py`).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from trainer import config
from trainer.config import presets
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import run_folder, run_status
from trainer.runs.atomic_files import atomic_write

EXAMPLE = EMBEDDED_FOLDER.parent / "examples" / "subject"
PRESET = "embedded-subject"
BACKGROUNDS = ("white", "blue", "pink", "yellow", "purple", "black", "orange", "green")
OTHER_PROMPTS = 12  # prompts without the trigger, from the scorer's fixed list
STRENGTHS = (0.0, 1.0)
FIRST_SEED = 900
TILE = 96  # pixels of one picture in the grid


def demo(parent: Path, run_in: Callable[[Path], int]) -> int:
    """Trains, samples at several strengths, writes before-after.png, report.json and report.md into the run folder."""
    from trainer.embedded.score import TRIGGER

    run = config.replace(
        presets.load_preset(PRESET).config,
        {"name": TRIGGER, "dataset.folder": str(EXAMPLE), "dataset.trigger": TRIGGER},
    )
    folder = run_folder.create(run, parent)
    code = run_in(folder)
    status = run_status.read_status(folder)
    if code != 0 or status.finished is None:
        return code
    write_report(folder, measure(run, folder, folder / status.finished.file), status)
    print((folder / "report.md").read_text(encoding="utf-8"))
    return 0


def measure(run: config.RunConfig, folder: Path, adapter: Path) -> dict[str, Any]:
    """Draws everything at every strength. Gives, by strength: likeness to the subject with and without the trigger, and what the
    prompts without it still get right (mean of background, colour and object)."""
    from trainer.embedded import score  # these read models, which the start need not wait for
    from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter

    texts, scenes = zip(*score.fixed_prompts(OTHER_PROMPTS), strict=True)
    prompts = [
        score.SUBJECT_PROMPT.format(background=background) for background in BACKGROUNDS
    ] + list(texts)
    sampler, chosen = Sampler(), run.sampling

    def draw(
        name: str, adapters: list[StackedAdapter], prompts: Sequence[str] = prompts
    ) -> list[Image.Image]:
        files = [folder / "demo" / f"{name}-{i:02d}.png" for i in range(len(prompts))]
        for i, (prompt, file) in enumerate(zip(prompts, files, strict=True)):
            settings: dict[str, Any] = {
                "seed": FIRST_SEED + i,
                "inference_steps": chosen.inference_steps,
                "guidance_scale": chosen.guidance_scale,
            }
            sampler.render(
                SampleRequest(
                    prompt=prompt, target=str(file), base=run.base, adapters=adapters, **settings
                )
            )
        return [Image.open(file).convert("RGB") for file in files]

    count = len(BACKGROUNDS)
    base = draw("base", [], prompts[:count])
    drawn = {
        f"{s:g}": draw(f"strength-{s:g}", [StackedAdapter(str(adapter), s)]) for s in STRENGTHS
    }
    rows = [
        images[part]
        for part in (slice(count), slice(count, 2 * count))
        for images in drawn.values()
    ]
    labels = [f"{kind}, strength {s}" for kind in ("with the trigger", "without it") for s in drawn]
    save_grid(folder / "before-after.png", rows, labels)
    return {
        "with_trigger": {
            s: round(score.subject_similarity(images[:count]), 3) for s, images in drawn.items()
        },
        "without_trigger": {
            s: round(score.subject_similarity(images[count:]), 3) for s, images in drawn.items()
        },
        "other_prompts_right": {
            s: round(_mean(score.judge(images[count:], scenes)), 3) for s, images in drawn.items()
        },
        "strength_0_is_base": all(
            a.tobytes() == b.tobytes() for a, b in zip(base, drawn["0"][:count], strict=True)
        ),
    }


def _mean(score: Any) -> float:
    return float(np.mean([score.background, score.colour, score.object]))


def write_report(folder: Path, report: dict[str, Any], status: run_status.RunStatus) -> None:
    """report.json for programs, report.md for people."""
    assert status.started and status.finished
    report = report | {
        "steps": status.step,
        "seconds": round(status.finished.seconds, 1),
        "device": status.started.device,
        "trainable_parameters": status.started.trainable_parameters,
        "adapter": status.finished.file,
    }
    atomic_write(folder / "report.json", json.dumps(report, indent=1))
    columns = ("with_trigger", "without_trigger", "other_prompts_right")
    rows = "\n".join(
        f"| {s} | " + " | ".join(f"{report[column][s]:.2f}" for column in columns) + " |"
        for s in report["with_trigger"]
    )
    equals = "equal" if report["strength_0_is_base"] else "DIFFER FROM"
    lines = f"""# What the adapter learned

{report["steps"]} steps in {report["seconds"]:.0f} s on {report["device"]}; {report["trainable_parameters"]:,} parameters trained.
At strength 0 the {len(BACKGROUNDS)} pictures with the trigger {equals} the base's, bit for bit.

| strength | shows the subject: prompts with its trigger | prompts without it | what prompts without it get right |
|---|---|---|---|
{rows}

Shares of pictures, 0 to 1: the subject by a small classifier, the rest (background, colour, object) by that and pixel statistics.

Pictures: {folder / "before-after.png"}
Adapter: {folder / report["adapter"]}
"""
    atomic_write(folder / "report.md", lines)


def save_grid(path: Path, rows: Sequence[Sequence[Image.Image]], labels: Sequence[str]) -> None:
    """Pictures in rows, each row under its label."""
    label_height, gap = 18, 4
    width = max(len(row) for row in rows) * (TILE + gap) + gap
    grid = Image.new("RGB", (width, len(rows) * (TILE + label_height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = y * (TILE + label_height + gap)
        draw.text((gap, top + 3), label, fill="black")
        for x, image in enumerate(row):
            grid.paste(
                image.resize((TILE, TILE), Image.Resampling.LANCZOS),
                (gap + x * (TILE + gap), top + label_height),
            )
    grid.save(path)
