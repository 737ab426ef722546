"""Measures what each way of training achieves on the embedded base, for docs/experiments.md.

    python -m benchmarks.experiments [--jobs 2] [--only lion dora] [--table]

Each row is a short run of the preset `embedded-subject` on attention alone, with the settings of
the row. Each row runs in its own process with one thread. The results are appended to a file of
JSON lines. An interrupted call continues with the missing rows, and a row whose settings have
changed is measured again. The table is between two markers of the document. `--table` only writes
the table from the results.

Two numbers judge a row independently of its training loss: the unweighted error of the predicted
noise on new drawings, and the labels that a small classifier gives to samples of new prompts.
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
"""Settings of the plain preset, fixed here because the preset may change."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "experiments.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
STRIPED = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
UNSEEN = ("green", "meadow", "sea", "night", *(f"{colour} stripes" for colour in STRIPED))
"""Backgrounds that the training captions do not name."""
SEEDS_A_BACKGROUND = 2
OTHER_PROMPTS = 24
DRAWINGS = 20
FIRST_SEED = 9_500_000  # of drawings and noise; no training image has a seed from 9,000,000 on
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
    """Differences from the plain preset. None measures the base without a training."""


def lora(**settings: Any) -> dict[str, Any]:
    return {f"adapter.{name}": value for name, value in settings.items()}


def training(**settings: Any) -> dict[str, Any]:
    return {f"training.{name}": value for name, value in settings.items()}


def objective(**settings: Any) -> dict[str, Any]:
    return {f"objective.{name}": value for name, value in settings.items()}


def rates(factor: float) -> dict[str, Any]:
    """Returns the two learning rates of the plain preset, multiplied by a factor."""
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
    """Returns the settings of the run, with the fewest samples, as `judge` makes others."""
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
    """Returns a hash of everything that the measurement depends on, except the program."""
    measured = [PLAIN, STEPS, UNSEEN, SEEDS_A_BACKGROUND, OTHER_PROMPTS, DRAWINGS, INFERENCE_STEPS]
    return hashlib.sha256(
        json.dumps([row.settings, measured], sort_keys=True).encode()
    ).hexdigest()[:16]


# One row, in its own process


def run_row(row: Row, results: Path) -> None:
    """Trains and judges a row, and appends it to the results.

    Measures processor seconds, because other programs may run at the same time.
    """
    from trainer.training.runner import run_in

    with tempfile.TemporaryDirectory(prefix="experiment-") as outputs:
        os.environ["ATELIER_OUTPUTS"] = outputs
        run = config.replace(presets.load_preset(PRESET).config, settings_of(row))
        adapter, seconds, parameters = None, 0.0, 0
        if row.settings is not None:
            folder = run_folder.create(run)
            begin = time.process_time()
            exit_code = run_in(folder)
            seconds = time.process_time() - begin
            status = run_status.read_status(folder)
            if exit_code:
                raise SystemExit(f"{row.name}: {status.message}")
            adapter, parameters = folder / status.finished.file, status.started.trainable_parameters
        measured = judge(run, adapter) | {"seconds": round(seconds, 1), "parameters": parameters}
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key(row), **asdict(row), **measured}) + "\n")


def judge(run: config.RunConfig, adapter: Path | None) -> dict[str, float]:
    """Returns the measured columns of the base with an adapter, or without one."""
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
    subject_scenes = [
        world.Scene("zorbit", "green", background)
        for background in UNSEEN
        for _ in range(SEEDS_A_BACKGROUND)
    ]
    prompts = [
        f"a {score.TRIGGER} {world.describe_background(scene.background, rng)}"
        for scene in subject_scenes
    ]
    other_prompts, other_scenes = zip(*score.fixed_prompts(OTHER_PROMPTS), strict=True)

    def draw(texts: Any) -> list[Any]:
        return score.draw_prompts(
            base.pipe, texts, INFERENCE_STEPS, run.sampling.guidance_scale, first_seed=FIRST_SEED
        )

    subject, others = draw(prompts), draw(other_prompts)
    zorbit = score.LABELS.index(score.TRIGGER)
    right = score.judge(others, other_scenes)
    return {
        "loss": loss_on_new_drawings(base),
        "likeness": float(score.classify(subject)[:, zorbit].mean()),
        "background": score.judge(subject, subject_scenes).background,
        "leak": float(score.classify(others)[:, zorbit].mean()),
        "others": (right.background + right.colour + right.object) / 3,
    }


def loss_on_new_drawings(base: Any, timesteps: int = 8) -> float:
    """Returns the mean squared error of the predicted noise on new drawings.

    Every row has the same noise and timesteps.
    """
    import numpy as np
    import torch

    from trainer.embedded import score, world
    from trainer.families.base import Batch

    vae, losses = base.pipe.vae, []
    objective = base.family.objective(base.pipe)
    fractions = (torch.arange(timesteps) + 0.5) / timesteps
    with torch.no_grad():
        for index in range(DRAWINGS):
            background = list(world.COLOURS)[index % len(world.COLOURS)]
            drawing = np.asarray(world.draw_subject(background, FIRST_SEED + index))
            pixels = torch.from_numpy(drawing / 127.5 - 1).float().permute(2, 0, 1)
            latents = vae.encode(pixels[None]).latent_dist.mean * vae.config.scaling_factor
            conditioning = base.encode([score.SUBJECT_PROMPT.format(background=background)])
            repeated = {
                name: tensor.expand(timesteps, *tensor.shape[1:])
                for name, tensor in conditioning.items()
            }
            generator = torch.Generator().manual_seed(FIRST_SEED + index)
            noise = torch.randn(timesteps, *latents.shape[1:], generator=generator)
            batch = Batch(latents.expand_as(noise), repeated, torch.zeros(timesteps, 6))
            noised = objective.noised(batch.latents, noise, objective.timesteps(fractions))
            error = base.family.predict(base.denoiser, noised, batch) - noised.target
            losses.append(error.square().mean())
    return float(torch.stack(losses).mean())


# All rows


def measured_rows(results: Path) -> dict[str, dict[str, Any]]:
    """Returns the measured rows by key. If a row was measured twice, the later line counts."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["key"]: row for row in rows}


def start_row(row: Row, results: Path) -> None:
    """Measures a row in a new process and prints its duration or its error."""
    module = [sys.executable, "-m", "benchmarks.experiments"]
    command = [*module, "--row", row.name, "--results", str(results)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    error = f": {(ended.stderr.splitlines() or ['no message'])[-1]}" if ended.returncode else ""
    print(f"{time.strftime('%H:%M:%S')} {row.name}: {seconds:.0f} s{error}", flush=True)


def table(measured: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{STEPS} steps at batch 4, unless the row gives another number; one CPU thread, "
        "processor seconds of the training."
    ]
    for group in dict.fromkeys(row.group for row in ROWS):
        lines += ["", f"| {group} | {' | '.join(COLUMNS)} |", "|---" + "|--:" * len(COLUMNS) + "|"]
        for row in ROWS:
            m = measured.get(key(row))
            if row.group == group and m:
                scores = (m["likeness"], m["background"], m["leak"], m["others"])
                columns = " | ".join(f"{score:.2f}" for score in scores)
                lines.append(
                    f"| {row.name} | {m['loss']:.4f} | {columns} "
                    f"| {m['parameters']:,} | {m['seconds']:.0f} |"
                )
    return "\n".join(lines)


def write_table(measured: dict[str, dict[str, Any]]) -> None:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    atomic_write(DOCUMENT, f"{before}{BEGIN}\n{table(measured)}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of rows measured at the same time"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows whose name contains one of these words"
    )
    parser.add_argument("--table", action="store_true", help="only write the table")
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
