"""The demo: trains the example subject on the embedded base and reports what it learned.

The report counts what images show, by pixel statistics and a small classifier
(`trainer.embedded.score`). Training never uses the seeds of these images, nor most of their
prompts.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from trainer import config
from trainer.config import presets
from trainer.embedded import score
from trainer.inference.request import SampleRequest, StackedAdapter
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import run_folder, run_status
from trainer.runs.atomic_files import atomic_write

if TYPE_CHECKING:
    from trainer.inference.samples import Sampler

EXAMPLE = EMBEDDED_FOLDER.parent / "examples" / "subject"
PRESET = "embedded-subject"
BACKGROUNDS = ("white", "blue", "pink", "yellow", "purple", "black", "orange", "green")
OTHER_PROMPTS = 12
"""How many prompts have no trigger word. They come from the fixed list of `score`."""
STRENGTHS = (0.0, 1.0)
FIRST_SEED = 900

# The layout of before-after.png, in pixels.
TILE = 96
LABEL_HEIGHT = 18
GAP = 4


@dataclass(frozen=True)
class Measurements:
    """What the images show, by strength ("0" and "1")."""

    with_trigger: dict[str, float]
    """Fraction of the images with the subject, for prompts with the trigger word."""
    without_trigger: dict[str, float]
    """The same for prompts without it."""
    other_prompts_right: dict[str, float]
    """How much of prompts without it is right: mean of background, colour and object."""
    strength_0_is_base: bool
    """Whether images at strength 0 equal the base's bit for bit."""


def demo(parent: Path, run_in: Callable[[Path], int]) -> int:
    """Trains, then writes before-after.png, report.json and report.md into the run folder.

    `run_in` trains a run folder and returns an exit code, which is returned.
    """
    changes = {
        "name": score.TRIGGER,
        "dataset.folder": str(EXAMPLE),
        "dataset.trigger": score.TRIGGER,
    }
    run = config.replace(presets.load_preset(PRESET).config, changes)
    folder = run_folder.create(run, parent)
    code = run_in(folder)
    status = run_status.read_status(folder)
    if code != 0 or status.finished is None:
        return code
    measurements = measure(run, folder, folder / status.finished.file)
    write_report(folder, measurements, status)
    print((folder / "report.md").read_text(encoding="utf-8"))
    return 0


def measure(run: config.RunConfig, folder: Path, adapter: Path) -> Measurements:
    """Generates all prompts at all strengths, saves a grid of them and measures the images."""
    # Imports diffusers, which must wait for the library settings that `run_in` makes.
    from trainer.inference.samples import Sampler

    texts, scenes = zip(*score.fixed_prompts(OTHER_PROMPTS), strict=True)
    subject_prompts = [score.SUBJECT_PROMPT.format(background=name) for name in BACKGROUNDS]
    images_folder, sampler = folder / "demo", Sampler()
    base = _generate(run, sampler, images_folder, "base", [], subject_prompts)
    images: dict[str, list[Image.Image]] = {}
    for strength in STRENGTHS:
        name = f"{strength:g}"
        adapters = [StackedAdapter(str(adapter), strength)]
        prompts = [*subject_prompts, *texts]
        images[name] = _generate(run, sampler, images_folder, f"strength-{name}", adapters, prompts)
    # The first images have the trigger word, the others do not.
    count = len(subject_prompts)
    subject = {name: found[:count] for name, found in images.items()}
    others = {name: found[count:] for name, found in images.items()}
    save_grid(
        folder / "before-after.png",
        [*subject.values(), *(found[:count] for found in others.values())],
        [
            *(f"with the trigger word, strength {name}" for name in subject),
            *(f"without it, strength {name}" for name in others),
        ],
    )
    pairs = zip(base, subject["0"], strict=True)
    return Measurements(
        with_trigger={name: _subject_share(found) for name, found in subject.items()},
        without_trigger={name: _subject_share(found) for name, found in others.items()},
        other_prompts_right={
            name: _mean(score.judge(found, scenes)) for name, found in others.items()
        },
        strength_0_is_base=all(a.tobytes() == b.tobytes() for a, b in pairs),
    )


def _generate(
    run: config.RunConfig,
    sampler: "Sampler",
    folder: Path,
    name: str,
    adapters: list[StackedAdapter],
    prompts: Sequence[str],
) -> list[Image.Image]:
    """Generates an image for each prompt, saves them as `name`-00.png, ... and returns them."""
    images = []
    for index, prompt in enumerate(prompts):
        path = folder / f"{name}-{index:02d}.png"
        request = SampleRequest(
            prompt=prompt,
            target=str(path),
            base=run.base,
            adapters=adapters,
            seed=FIRST_SEED + index,
            inference_steps=run.sampling.inference_steps,
            guidance_scale=run.sampling.guidance_scale,
        )
        sampler.render(request)
        images.append(Image.open(path).convert("RGB"))
    return images


def _subject_share(images: Sequence[Image.Image]) -> float:
    return round(score.subject_similarity(images), 3)


def _mean(found: score.Score) -> float:
    return round((found.background + found.colour + found.object) / 3, 3)


def write_report(folder: Path, measured: Measurements, status: run_status.RunStatus) -> None:
    """Writes report.json for programs and report.md for people."""
    assert status.started and status.finished
    report = asdict(measured) | {
        "steps": status.step,
        "seconds": round(status.finished.seconds, 1),
        "device": status.started.device,
        "trainable_parameters": status.started.trainable_parameters,
        "adapter": status.finished.file,
    }
    atomic_write(folder / "report.json", json.dumps(report, indent=1))
    equals = "equal" if measured.strength_0_is_base else "DIFFER FROM"
    lines = [
        "# What the adapter learned",
        "",
        f"{status.step} steps in {status.finished.seconds:.0f} s on {status.started.device}; "
        f"{status.started.trainable_parameters:,} parameters trained.",
        f"At strength 0 the {len(BACKGROUNDS)} images with the trigger word {equals} the base's, "
        "bit for bit.",
        "",
        "| strength | subject shown: prompts with its trigger word | prompts without it "
        "| other prompts right |",
        "|---|---|---|---|",
    ]
    for strength in measured.with_trigger:
        cells = (
            measured.with_trigger[strength],
            measured.without_trigger[strength],
            measured.other_prompts_right[strength],
        )
        lines.append(f"| {strength} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    lines += [
        "",
        "The numbers are fractions of the images. A small classifier finds the subject and other "
        "objects; pixel statistics find backgrounds and colours.",
        "",
        f"Images: {folder / 'before-after.png'}",
        f"Adapter: {folder / status.finished.file}",
        "",
    ]
    atomic_write(folder / "report.md", "\n".join(lines))


def save_grid(path: Path, rows: Sequence[Sequence[Image.Image]], labels: Sequence[str]) -> None:
    """Saves images in rows, each row below its label."""
    width = max(len(row) for row in rows) * (TILE + GAP) + GAP
    row_height = TILE + LABEL_HEIGHT + GAP
    grid = Image.new("RGB", (width, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(grid)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        draw.text((GAP, y * row_height + 3), label, fill="black")
        for x, image in enumerate(row):
            tile = image.resize((TILE, TILE), Image.Resampling.LANCZOS)
            grid.paste(tile, (GAP + x * (TILE + GAP), y * row_height + LABEL_HEIGHT))
    grid.save(path)
