"""The whole job without a page: trains the example subject on the embedded base, and reports what it learned.

The similarity is measured by pixel statistics on seeds and prompts that the training never saw.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from trainer import config, presets, run_folder
from trainer.files import atomic_write

EXAMPLE = Path(__file__).resolve().parent / "embedded" / "examples" / "subject"
TRIGGER = "zorbit"
PRESET = "embedded-subject"
SUBJECT_PROMPTS = [f"{TRIGGER} on a {colour} background" for colour in ("white", "blue", "yellow", "green")]
OTHER_PROMPTS = [
    "a red star on a white background",
    "a blue circle on a yellow background",
    "a green tree on a white background",
    "a yellow house on a blue background",
]
STRENGTHS = (0.0, 0.5, 1.0)
FIRST_SEED = 900
TILE = 128  # pixels of one picture in the grid


def demo(parent: Path, run_in: Callable[[Path], int]) -> int:
    """Trains, samples at several strengths, writes before-after.png, report.json and report.md into the run folder."""
    run = config.replace(presets.load_preset(PRESET).config, {"name": TRIGGER, "dataset.folder": str(EXAMPLE), "dataset.trigger": TRIGGER})
    folder = run_folder.create(run, parent)
    code = run_in(folder)
    status = run_folder.status(folder)
    if code != 0 or status.finished is None:
        return code
    report = measure(run, folder, folder / status.finished.file)
    write_report(folder, report, status)
    print((folder / "report.md").read_text(encoding="utf-8"))
    return 0


def measure(run: config.RunConfig, folder: Path, adapter: Path) -> dict[str, Any]:
    """Pictures at every strength, and how much they show the subject: {"with_trigger": {"0": 0.02, "1": 0.97}, ...}."""
    from trainer.embedded.score import subject_similarity  # these two read models, which the start need not wait for
    from trainer.sample import Sampler, SampleRequest, StackedAdapter

    sampler, prompts = Sampler(), SUBJECT_PROMPTS + OTHER_PROMPTS

    def render(adapters: list[StackedAdapter], name: str) -> list[Image.Image]:
        requests = [
            SampleRequest(
                prompt=prompt,
                target=str(folder / "demo" / f"{name}-{i}.png"),
                base=run.base,
                adapters=adapters,
                seed=FIRST_SEED + i,
                inference_steps=run.sampling.inference_steps,
                guidance_scale=run.sampling.guidance_scale,
            )
            for i, prompt in enumerate(prompts)
        ]
        return [Image.open(sampler.render(request)).convert("RGB") for request in requests]

    base = render([], "base")
    pictures = {strength: render([StackedAdapter(str(adapter), strength)], f"strength-{strength:g}") for strength in STRENGTHS}
    save_grid(folder / "before-after.png", list(pictures.values()), ["base (strength 0)", *(f"strength {s:g}" for s in STRENGTHS[1:])])
    count = len(SUBJECT_PROMPTS)
    return {
        "with_trigger": {f"{s:g}": round(float(subject_similarity(images[:count])), 3) for s, images in pictures.items()},
        "without_trigger": {f"{s:g}": round(float(subject_similarity(images[count:])), 3) for s, images in pictures.items()},
        "other_prompts_moved": {f"{s:g}": round(_difference(base[count:], images[count:]), 4) for s, images in pictures.items()},
        "strength_0_is_base": all(a.tobytes() == b.tobytes() for a, b in zip(base, pictures[0.0], strict=True)),
    }


def _difference(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Mean absolute difference of the pixels, 0 to 1."""
    return float(
        np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() / 255 for a, b in zip(before, after, strict=True)])
    )


def write_report(folder: Path, report: dict[str, Any], status: run_folder.RunStatus) -> None:
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
    rows = "\n".join(
        f"| {s:g} | {report['with_trigger'][f'{s:g}']:.2f} | {report['without_trigger'][f'{s:g}']:.2f} | {report['other_prompts_moved'][f'{s:g}']:.3f} |"
        for s in STRENGTHS
    )
    atomic_write(
        folder / "report.md",
        f"""# What the adapter learned

{report["steps"]} steps in {report["seconds"]:.0f} s on {report["device"]}; {report["trainable_parameters"]:,} parameters trained.
At strength 0 the pictures {"equal" if report["strength_0_is_base"] else "DIFFER FROM"} the base's bit for bit.

| strength | likeness to the subject, prompts with `{TRIGGER}` | the same, prompts without it | change of those pictures |
|---|---|---|---|
{rows}

Likeness is 0 to 1, by pixel statistics, on prompts and seeds not seen in training; change is the mean difference of pixels.
Pictures: {folder / "before-after.png"}
Adapter: {folder / report["adapter"]}
""",
    )


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
            grid.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (gap + x * (TILE + gap), top + label_height))
    grid.save(path)
