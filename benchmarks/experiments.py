"""What each way of training brings on the embedded base: the table in docs/experiments.md.

    python -m benchmarks.experiments [--jobs 2] [--only lion dora] [--table]

Every row is a short run of one recipe, that of the preset `embedded-subject` on attention alone, with the settings of its row. What was
measured is kept in a file of JSON lines: an interrupted call goes on where it was, and a row whose settings were changed is measured
again. The table stands between the markers of the document; `--table` only writes it, from what is there. A row runs in a process of its
own, with one thread.

The judge knows nothing of the loss that was trained: the unweighted error of the predicted noise on drawings that no training saw, and a
small classifier that looks at pictures of prompts that no caption has.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import config
from trainer.cli.demo_report import EXAMPLE, PRESET
from trainer.config import presets
from trainer.runs import run_folder, run_status
from trainer.runs.atomic_files import atomic_write

STEPS = 240
PLAIN: dict[str, Any] = {
    "adapter.targets": "attention",
    "adapter.rank": 16,
    "adapter.alpha": 16.0,
    "training.learning_rate": 1.5e-3,
    "training.text_encoder_learning_rate": 7e-4,
}
"""Of the preset, which may change, what the rows are compared on."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "experiments.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
STRIPED = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
UNSEEN = ("green", "meadow", "sea", "night", *(f"{colour} stripes" for colour in STRIPED))
"""Backgrounds that the training captions do not name."""
SEEDS_A_BACKGROUND = 2
OTHER_PROMPTS = 24
DRAWINGS = 20
FIRST_SEED = 9_500_000  # of drawings and noise; no training picture has one from 9,000,000 on
INFERENCE_STEPS = 15
COLUMNS = (
    "held-out loss",
    "likeness",
    "background right",
    "leak",
    "other prompts right",
    "parameters",
    "seconds",
)


@dataclass(frozen=True)
class Row:
    group: str
    name: str
    settings: dict[str, Any] | None
    """What differs from the plain recipe; None trains nothing."""


def lora(**settings: Any) -> dict[str, Any]:
    return {f"adapter.{name}": value for name, value in settings.items()}


def training(**settings: Any) -> dict[str, Any]:
    return {f"training.{name}": value for name, value in settings.items()}


def objective(**settings: Any) -> dict[str, Any]:
    return {f"objective.{name}": value for name, value in settings.items()}


def rates(factor: float) -> dict[str, Any]:
    """The plain recipe's two learning rates times a factor."""
    return {
        name: PLAIN[name] * factor
        for name in ("training.learning_rate", "training.text_encoder_learning_rate")
    }


ROWS = (
    Row("Plain", "the base alone", None),
    Row("Plain", "plain recipe", {}),
    Row("Plain", "plain recipe, second seed", training(seed=1)),
    Row("Plain", "plain recipe, third seed", training(seed=2)),
    Row("Adapter", "rsLoRA, rank 64, scale 1", lora(kind="rslora", rank=64, alpha=8.0)),
    Row("Adapter", "DoRA", lora(kind="dora")),
    Row("Adapter", "LoHa, rank 8", lora(kind="loha", rank=8, alpha=8.0)),
    Row("Adapter", "LoKr, factor 4", lora(kind="lokr", lokr_factor=4)),
    Row(
        "Adapter",
        "LoHa, rank 8, four times the rates",
        lora(kind="loha", rank=8, alpha=8.0) | rates(4),
    ),
    Row(
        "Adapter",
        "LoKr, factor 4, four times the rates",
        lora(kind="lokr", lokr_factor=4) | rates(4),
    ),
    Row("Adapter", "LoCon (linear + conv)", lora(targets="linear+conv")),
    Row("Adapter", "LoCon, second seed", lora(targets="linear+conv") | training(seed=1)),
    Row(
        "Adapter",
        "LoCon, 170 steps, as long as the plain recipe takes",
        lora(targets="linear+conv") | training(steps=170),
    ),
    Row(
        "Adapter",
        "LoCon, 170 steps, second seed",
        lora(targets="linear+conv") | training(steps=170, seed=1),
    ),
    Row(
        "Adapter",
        "LoCon, 170 steps, rank 8",
        lora(targets="linear+conv", rank=8, alpha=8.0) | training(steps=170),
    ),
    Row(
        "Adapter",
        "LoCon, 170 steps, half the rates",
        lora(targets="linear+conv") | training(steps=170) | rates(1 / 2),
    ),
    Row(
        "Adapter",
        "LoCon, 170 steps, debiased",
        lora(targets="linear+conv") | training(steps=170) | objective(weighting="debiased"),
    ),
    Row("Adapter", "attention + feed-forward", lora(targets="attention+feed-forward")),
    Row("Adapter", "cross attention only", lora(target_pattern="attn2")),
    Row("Adapter", "PiSSA", lora(init="pissa")),
    Row("Adapter", "OLoRA", lora(init="olora")),
    Row("Adapter", "orthogonal start", lora(init="orthogonal")),
    Row("Adapter", "gaussian start", lora(init="gaussian")),
    Row("Adapter", "rank 4", lora(rank=4, alpha=4.0)),
    Row("Adapter", "rank 64", lora(rank=64, alpha=64.0)),
    Row("Adapter", "dropout 0.1", lora(dropout=0.1)),
    Row("Adapter", "norm cap 1", lora(max_norm=1.0)),
    Row("Adapter", "text encoder frozen", training(text_encoder_learning_rate=0.0)),
    Row("Optimiser", "lion, a third of the rates", training(optimizer="lion") | rates(1 / 3)),
    Row("Optimiser", "lion, a tenth", training(optimizer="lion") | rates(1 / 10)),
    Row("Optimiser", "adafactor", training(optimizer="adafactor")),
    Row(
        "Optimiser",
        "prodigy",
        training(optimizer="prodigy", learning_rate=1.0, text_encoder_learning_rate=1.0),
    ),
    Row(
        "Optimiser",
        "schedule-free AdamW",
        training(optimizer="schedule_free_adamw", lr_schedule="constant"),
    ),
    Row("Optimiser", "AdamW, half the rates", rates(1 / 2)),
    Row("Optimiser", "AdamW, twice the rates", rates(2)),
    Row("Optimiser", "constant rate", training(lr_schedule="constant")),
    Row("Optimiser", "average of the weights (EMA 0.99)", training(ema_decay=0.99)),
    Row("Objective", "min-SNR off", objective(min_snr_gamma=0.0)),
    Row("Objective", "debiased", objective(weighting="debiased")),
    Row("Objective", "P2", objective(weighting="p2")),
    Row("Objective", "huber", objective(loss="huber")),
    Row("Objective", "smooth L1", objective(loss="smooth_l1")),
    Row("Objective", "logit-normal timesteps", objective(timestep_sampling="logit_normal")),
    Row("Objective", "noise offset 0.05", objective(noise_offset=0.05)),
    Row("Objective", "pyramid noise 0.2", objective(pyramid_noise=0.2)),
    Row("Objective", "input perturbation 0.1", objective(input_perturbation=0.1)),
    Row("Objective", "prior preservation 1", objective(prior_preservation=1.0)),
    Row("Data", "caption dropout 0.1", {"dataset.caption_dropout": 0.1}),
    Row("Data", "flip", {"dataset.flip": True}),
)


def settings_of(row: Row) -> dict[str, Any]:
    """As trained: no more samples than the trainer insists on, since the row is judged afterwards."""
    from trainer.embedded.score import TRIGGER

    short = {
        "training.steps": STEPS,
        "saving.saves": 1,
        "sampling.prompts": ("a",),
        "sampling.inference_steps": 1,
    }
    return (
        short
        | PLAIN
        | {"name": "row", "dataset.folder": str(EXAMPLE), "dataset.trigger": TRIGGER}
        | (row.settings or {})
    )


def key(row: Row) -> str:
    """Changes with everything that the measurement depends on, but the program."""
    measured = [PLAIN, STEPS, UNSEEN, SEEDS_A_BACKGROUND, OTHER_PROMPTS, DRAWINGS, INFERENCE_STEPS]
    return hashlib.sha256(
        json.dumps([row.settings, measured], sort_keys=True).encode()
    ).hexdigest()[:16]


# ---------------------------------------------------------------- one row, in a process of its own


def run_row(row: Row, results: Path) -> None:
    """Trains it, judges it and adds its line to the results. Seconds are the processor's, since other programs may run beside."""
    from trainer.training.runner import run_in

    with tempfile.TemporaryDirectory(prefix="experiment-") as place:
        os.environ["ATELIER_OUTPUTS"] = place
        run, adapter, seconds, parameters = (
            config.replace(presets.load_preset(PRESET).config, settings_of(row)),
            None,
            0.0,
            0,
        )
        if row.settings is not None:
            folder, begin = run_folder.create(run), time.process_time()
            if run_in(folder):
                raise SystemExit(f"{row.name}: {run_status.read_status(folder).message}")
            seconds, status = time.process_time() - begin, run_status.read_status(folder)
            adapter, parameters = folder / status.finished.file, status.started.trainable_parameters
        measured = judge(run, adapter) | {"seconds": round(seconds, 1), "parameters": parameters}
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key(row), **asdict(row), **measured}) + "\n")


def judge(run: config.RunConfig, adapter: Path | None) -> dict[str, float]:
    import numpy as np
    import torch

    from trainer.embedded import score, world
    from trainer.families import load_base
    from trainer.lora.apply import Stack, WeightedAdapter
    from trainer.lora.formats.reader import read_adapter

    base = load_base(run.base, torch.float32)
    if adapter:
        Stack(base).apply([WeightedAdapter(read_adapter(adapter), 1.0, 1.0)])
    rng = np.random.default_rng(FIRST_SEED)
    asked = [
        world.Scene("zorbit", "green", background)
        for background in UNSEEN
        for _ in range(SEEDS_A_BACKGROUND)
    ]
    prompts = [
        f"a {score.TRIGGER} {world.describe_background(scene.background, rng)}" for scene in asked
    ]
    texts, scenes = zip(*score.fixed_prompts(OTHER_PROMPTS), strict=True)

    def draw(wanted: Any) -> list[Any]:
        return score.draw_prompts(
            base.pipe, wanted, INFERENCE_STEPS, run.sampling.guidance_scale, first_seed=FIRST_SEED
        )

    subject, others = draw(prompts), draw(texts)
    zorbit, right = score.LABELS.index(score.TRIGGER), score.judge(others, scenes)
    return {
        "loss": held_out_loss(base),
        "likeness": float(score.classify(subject)[:, zorbit].mean()),
        "background": score.judge(subject, asked).background,
        "leak": float(score.classify(others)[:, zorbit].mean()),
        "others": (right.background + right.colour + right.object) / 3,
    }


def held_out_loss(base: Any, timesteps: int = 8) -> float:
    """Mean squared error of the predicted noise on drawings that no training saw, the same noise and timesteps for every row."""
    import numpy as np
    import torch

    from trainer.embedded import score, world
    from trainer.families.base import Batch

    vae, losses = base.pipe.vae, []
    objective, places = (
        base.family.objective(base.pipe),
        (torch.arange(timesteps) + 0.5) / timesteps,
    )
    with torch.no_grad():
        for index in range(DRAWINGS):
            background = list(world.COLOURS)[index % len(world.COLOURS)]
            pixels = (
                torch.from_numpy(
                    np.asarray(world.draw_subject(background, FIRST_SEED + index)) / 127.5 - 1
                )
                .float()
                .permute(2, 0, 1)
            )
            latents = vae.encode(pixels[None]).latent_dist.mean * vae.config.scaling_factor
            conditioning = base.encode([score.SUBJECT_PROMPT.format(background=background)])
            repeated = {
                name: tensor.expand(timesteps, *tensor.shape[1:])
                for name, tensor in conditioning.items()
            }
            noise = torch.randn(
                timesteps,
                *latents.shape[1:],
                generator=torch.Generator().manual_seed(FIRST_SEED + index),
            )
            batch = Batch(latents.expand_as(noise), repeated, torch.zeros(timesteps, 6))
            noised = objective.noised(batch.latents, noise, objective.timesteps(places))
            losses.append(
                (base.family.predict(base.denoiser, noised, batch) - noised.target).square().mean()
            )
    return float(torch.stack(losses).mean())


# ---------------------------------------------------------------- all rows


def measured_rows(results: Path) -> dict[str, dict[str, Any]]:
    """By key; of a row that was measured twice the later one."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {found["key"]: found for line in lines if (found := json.loads(line))}


def start_row(row: Row, results: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.experiments",
        "--row",
        row.name,
        "--results",
        str(results),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begin, ended = (
        time.monotonic(),
        subprocess.run(command, env=environment, capture_output=True, text=True),
    )
    fault = f": {(ended.stderr.splitlines() or ['no word'])[-1]}" if ended.returncode else ""
    print(
        f"{time.strftime('%H:%M:%S')} {row.name}: {time.monotonic() - begin:.0f} s{fault}",
        flush=True,
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{STEPS} steps at batch 4 if nothing else is said; CPU, one thread, processor seconds of the training."
    ]
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += ["", f"| {group} | {' | '.join(COLUMNS)} |", "|---" + "|--:" * len(COLUMNS) + "|"]
        for row in ROWS:
            if row.group == group and (m := found.get(key(row))):
                lines.append(
                    f"| {row.name} | {m['loss']:.4f} | {m['likeness']:.2f} | {m['background']:.2f} | {m['leak']:.2f} | {m['others']:.2f} "
                    f"| {m['parameters']:,} | {m['seconds']:.0f} |"
                )
    return "\n".join(lines)


def write_table(found: dict[str, dict[str, Any]]) -> None:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    atomic_write(DOCUMENT, f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows whose name has one of these in it"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("outputs/experiments.jsonl"),
        help="(default: %(default)s)",
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        run_row(next(row for row in ROWS if row.name == options.row), options.results)
        return 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = measured_rows(options.results)
    missing = [
        row
        for row in ROWS
        if key(row) not in done and any(word in row.name for word in options.only or [""])
    ]
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as jobs:
            list(jobs.map(lambda row: start_row(row, options.results), missing))
    done = measured_rows(options.results)
    write_table(done)
    failed = [row.name for row in missing if key(row) not in done and not options.table]
    print(
        f"{sum(key(row) in done for row in ROWS)} of {len(ROWS)} rows measured",
        *failed,
        sep="\n  failed: ",
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
