"""How long one optimiser step takes, beside the bare denoiser and a plain diffusers + PEFT + accelerate loop in the same run.

    python benchmarks/step.py [sd15 sdxl sd35m] [--resolution 512] [--batch 8] [--only ours plain] [--json FILE]

The denoiser has its full size and random weights, from the public configuration. Latents and conditioning are given to all alike, as
from the cache. On a CPU a row is the processor seconds of one thread, since other programs may run beside; on CUDA, wall-clock seconds.
`share` is the part of the floor that is reached: the operations no LoRA step can do without (docs/performance.md) over the measured time,
at the rate of a large matrix product on the same device.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from trainer import config, families
from trainer.config import RunConfig
from trainer.data.examples import Example, View
from trainer.families import FAMILIES, LoadedBase
from trainer.models.device import DTYPES, choose_device, device_name
from trainer.models.libraries import configure_libraries
from trainer.runs.events import EventLog
from trainer.training import loop, oom_fallbacks
from trainer.training.distributed import World
from trainer.training.session import Session, TrainingData, build_session
from trainer.training.step.cuda_graphs import GraphedPredict
from trainer.training.trainer_state import RunIdentity, TrainerState

CONFIGS = Path(families.__file__).parent / "configs"
VAE = {
    "sd15": {"scaling_factor": 0.18215, "shift_factor": None},
    "sdxl": {"scaling_factor": 0.13025, "shift_factor": None},
    "sd35m": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
}
FAMILY = {"sd15": "sd1", "sdxl": "sdxl", "sd35m": "sd35m"}
NATIVE = {"sd15": 512, "sdxl": 1024, "sd35m": 1024}
TERAFLOP = {
    ("sd15", 256): 0.369,
    ("sd15", 512): 1.788,
    ("sdxl", 512): 3.193,
    ("sdxl", 1024): 14.58,
    ("sd35m", 512): 5.432,
    ("sd35m", 1024): 28.91,
}
"""Of a step for one picture, by torch's flop counter: LoRA on every attention projection, nothing of the frozen weights differentiated."""

VARIANTS = {
    "plain": "diffusers + PEFT + accelerate, as their documentation writes it",
    "forward": "the bare frozen denoiser, forward only",
    "bare": "its forward, and the backward through its activations down to the first cross attention",
    "ours": "this program's step",
    "ours, without graphs": "the same without CUDA graphs",
    "ours, checkpointed": "the same with gradient checkpointing",
}


def denoiser(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """With random weights, made on the device in its number format."""
    part = "transformer" if (CONFIGS / model / "transformer").exists() else "unet"
    settings = json.loads((CONFIGS / model / part / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return (
                getattr(diffusers, settings["_class_name"])
                .from_config(settings)
                .requires_grad_(False)
                .eval()
            )
    finally:
        torch.set_default_dtype(torch.float32)


def given(
    model: str, net: Any, batch: int, resolution: int
) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
    """Shape of the latents of a picture, and a conditioning as the text encoders would give it."""
    generator = torch.Generator().manual_seed(1)
    if model == "sd35m":
        sizes = {
            "prompt_embeds": (77 + 256, net.config.joint_attention_dim),
            "pooled_prompt_embeds": (net.config.pooled_projection_dim,),
        }
    else:
        sizes = {"prompt_embeds": (77, net.config.cross_attention_dim)} | (
            {"pooled_prompt_embeds": (1280,)} if model == "sdxl" else {}
        )
    side = resolution // 8
    return (net.config.in_channels, side, side), {
        name: torch.randn(size, generator=generator) for name, size in sizes.items()
    }


def make_session(model: str, device: torch.device, precision: str, run: RunConfig) -> Session:
    """A training in memory, its latents and conditioning given; from there on it goes the trainer's own way."""
    resolution, family, net = (
        run.dataset.resolution,
        FAMILIES[FAMILY[model]],
        denoiser(model, device, DTYPES[precision]),
    )
    scheduler = json.loads(
        (CONFIGS / model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    )
    vae = SimpleNamespace(config=SimpleNamespace(**VAE[model]))
    parts = {
        "scheduler": getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        "vae": vae,
        family.denoiser_name: net,
    }
    parts |= {
        name: torch.nn.Module() for name in ("text_encoder", "text_encoder_2")
    }  # frozen and away, as after caching
    shape, conditioning = given(model, net, run.training.batch_size, resolution)
    sizes = (resolution, resolution, 0, 0, resolution, resolution)
    views = [
        View(torch.randn(shape), torch.full(shape, 0.1), sizes, None)
        for _ in range(run.training.batch_size)
    ]
    examples = [Example(str(i), resolution, "", "", (view,), 1, "") for i, view in enumerate(views)]
    log = EventLog(Path("/dev/null"))
    base = LoadedBase(family, SimpleNamespace(**parts, components=parts), None)
    return build_session(
        run,
        Path(),
        log,
        oom_fallbacks.Fallbacks(run, log),
        World(),
        device,
        precision,
        base,
        TrainingData(examples, [], [], {"": conditioning}),
    )


def our_step(
    model: str, device: torch.device, options: argparse.Namespace, variant: str
) -> Callable[[], None]:
    """What the loop in trainer/train.py does between two stations, in its order."""
    run = config.replace(
        RunConfig(),
        {
            "dataset.resolution": options.resolution,
            "adapter.rank": options.rank,
            "training.steps": 1000,
            "training.batch_size": options.batch,
            "training.cuda_graphs": variant != "ours, without graphs",
            "training.gradient_checkpointing": variant == "ours, checkpointed",
        },
    )
    session = make_session(model, device, options.precision, run)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    step, pending = 0, []
    state = TrainerState(RunIdentity("", {}, 0.0))

    def work() -> None:
        nonlocal step
        step += 1
        loss = loop.forward_backward(session, step, scaler)
        finite = loop.clip_gradients(session, scaler) & torch.isfinite(loss)
        pending.append(
            loop.optimizer_step(session, scaler, step, time.monotonic(), 0.0, loss, finite)
        )
        loop.report_finished_steps(session, pending, state, leave=int(pending[-1].is_ahead))
        assert not state.bad_steps

    work.session = session
    return work


def plain_step(model: str, device: torch.device, options: argparse.Namespace) -> Callable[[], None]:
    """As diffusers' example scripts for LoRA have it, but for the latents and conditioning, which are given here too."""
    AcceleratorState._reset_state()  # in which choose_device has left another precision
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(options.precision, options.precision),
        cpu=device.type == "cpu",
    )
    net = denoiser(model, device, DTYPES[options.precision])
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    ]
    net.add_adapter(
        LoraConfig(
            r=options.rank,
            lora_alpha=options.rank,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
    )
    net.to(device)
    cast_training_params(net, torch.float32)
    parameters = [p for p in net.parameters() if p.requires_grad]
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(parameters, lr=1e-4))
    net.train()
    shape, conditioning = given(model, net, options.batch, options.resolution)
    inputs = {
        name: tensor.to(device, DTYPES[options.precision]).expand(options.batch, *tensor.shape)
        for name, tensor in conditioning.items()
    }
    latents = torch.randn(options.batch, *shape, device=device)

    def work() -> None:
        noise, timesteps = (
            torch.randn_like(latents),
            torch.randint(0, 1000, (options.batch,), device=device),
        )
        noisy = (latents + noise).to(DTYPES[options.precision])
        model_pred = call(model, net, noisy, timesteps, inputs)
        loss = torch.nn.functional.mse_loss(model_pred.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()  # the scripts show it in every step

    return work


def bare_pass(
    model: str, device: torch.device, options: argparse.Namespace, backward: bool
) -> Callable[[], None]:
    dtype = DTYPES[options.precision]
    net = denoiser(model, device, dtype)
    shape, conditioning = given(model, net, options.batch, options.resolution)
    inputs = {
        name: tensor.to(device, dtype).repeat(options.batch, *[1] * tensor.dim())
        for name, tensor in conditioning.items()
    }
    noisy, timesteps = (
        torch.randn(options.batch, *shape, device=device, dtype=dtype),
        torch.zeros(options.batch, device=device),
    )
    inputs["prompt_embeds"].requires_grad_(backward)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            model_pred = call(model, net, noisy, timesteps, inputs)
        if backward:
            torch.autograd.grad(model_pred.float().square().mean(), inputs["prompt_embeds"])

    return work


def call(
    model: str,
    net: Any,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> torch.Tensor:
    if model == "sd35m":
        return net(
            noisy,
            inputs["prompt_embeds"],
            inputs["pooled_prompt_embeds"],
            timesteps.float(),
            return_dict=False,
        )[0]
    added = {}
    if model == "sdxl":
        side = noisy.shape[-1] * 8
        sizes = torch.tensor(
            [[side, side, 0, 0, side, side]] * len(noisy), device=noisy.device, dtype=noisy.dtype
        )
        added = {
            "added_cond_kwargs": {"text_embeds": inputs["pooled_prompt_embeds"], "time_ids": sizes}
        }
    return net(noisy, timesteps, inputs["prompt_embeds"], return_dict=False, **added)[0]


def seconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Of one step: the mean of some in a row on CUDA, which is what a training takes; the median processor time on a CPU."""
    for _ in range(4 if device.type == "cuda" else 1):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def waits(work: Callable[[], None]) -> int:
    """How often the host waits for the GPU within a step, as torch itself notices; the reading of a step before is none of them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in told)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second in a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b), device, 10 if device.type == "cuda" else 3)


def measure(
    model: str, device: torch.device, options: argparse.Namespace, variant: str, rate: float
) -> dict[str, Any]:
    """One row. The model is made anew, so that nothing of another variant is left in it."""
    torch._dynamo.reset()
    oom_fallbacks.release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    makers = {
        "forward": partial(bare_pass, backward=False),
        "bare": partial(bare_pass, backward=True),
        "plain": plain_step,
    }
    work = makers.get(variant, partial(our_step, variant=variant))(model, device, options)
    taken = seconds(work, device, options.repeats)
    teraflop = TERAFLOP.get((model, options.resolution)) if variant != "forward" else None
    row = {
        "model": model,
        "resolution": options.resolution,
        "batch": options.batch,
        "precision": options.precision,
        "rank": options.rank,
        "variant": variant,
        "seconds": taken,
        "pictures_per_second": options.batch / taken,
        "share_of_floor": teraflop and teraflop * 1e12 * options.batch / rate / taken,
        "peak_gib": (
            torch.cuda.max_memory_allocated()
            if device.type == "cuda"
            else psutil.Process().memory_info().rss
        )
        / 2**30,
        "setup_seconds": time.perf_counter() - begin - taken * options.repeats,
    }
    session = getattr(work, "session", None)
    if session and isinstance(session.model.predict, GraphedPredict):
        row |= {"graphs": len(session.model.predict.graphs), "refusal": session.model.predict.refusal}
    if device.type == "cuda":
        row["waits"] = waits(work)
    if options.profile and device.type == "cuda":
        with torch.profiler.profile() as profile:
            work()
            torch.cuda.synchronize()
        text = profile.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=80
        )
        Path(
            options.profile, f"{model}-{variant.replace(', ', '-').replace(' ', '-')}.txt"
        ).write_text(text, encoding="utf-8")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=["sd15"], choices=[*FAMILY, []], metavar="sd15 | sdxl | sd35m"
    )
    parser.add_argument("--resolution", type=int, help="pixels; the model's own where left out")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--precision", choices=DTYPES, help="bf16 on CUDA, fp32 on a CPU where left out"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:4])
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--profile", help="folder for a table of kernels of each row")
    options = parser.parse_args()
    device = choose_device()
    options.precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rate = matrix_rate(device, DTYPES[options.precision])
    print(
        f"{device_name(device)}, torch {torch.__version__}, {options.precision} matrix product {rate / 1e12:.2f} TFLOP/s",
        flush=True,
    )
    given_resolution = options.resolution
    for model in options.models:  # one alone, where `plain` is to be compared on a CPU
        options.resolution = given_resolution or NATIVE[model]
        for variant in [v for v in VARIANTS if v in options.only]:
            if (
                variant != "plain"
            ):  # which comes first, since what this does to the process cannot be taken back
                configure_libraries()
            row = measure(model, device, options, variant, rate)
            share = f"{row['share_of_floor']:.0%} of the floor" if row["share_of_floor"] else ""
            waited = f"the host waits {row['waits']} times" if "waits" in row else ""
            print(
                f"{model} {options.resolution} px x {options.batch} {variant:22s} {row['seconds']:8.4f} s"
                f"  {row['pictures_per_second']:7.2f}/s  {row['peak_gib']:6.2f} GiB  {share} {waited} {row.get('refusal', '')}",
                flush=True,
            )
            if options.json:
                with open(options.json, "a", encoding="utf-8") as file:
                    file.write(
                        json.dumps(
                            {"device": device_name(device), "torch": torch.__version__, **row}
                        )
                        + "\n"
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
