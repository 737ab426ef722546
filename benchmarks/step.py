"""Measures an optimiser step beside the bare denoiser and a plain diffusers + PEFT loop.

    python -m benchmarks.step [sd15 sdxl sd35m] [--resolution 512] [--batch 8]
        [--only ours plain] [--json FILE]

The denoiser has its full size and random weights, from the public configuration. All variants get
the same latents and conditioning, as from the cache. On a CPU a row is the processor seconds of one
thread, because other programs may run at the same time; on CUDA it is wall-clock seconds.
`share_of_floor` compares the measured time with the operations that every LoRA step needs
(docs/performance.md), at the rate of a large matrix product on the same device.
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

from benchmarks.measuring import keep
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
"""Operations of a step for one image, by torch's flop counter.

LoRA is on every attention projection, and no gradient of a frozen weight is computed.
"""

VARIANTS = {
    "plain": "diffusers + PEFT + accelerate, as in their documentation",
    "forward": "the bare frozen denoiser, forward only",
    "bare": "its forward, and the backward to the first cross attention",
    "ours": "this program's step",
    "ours, without graphs": "the same without CUDA graphs",
    "ours, checkpointed": "the same with gradient checkpointing",
}


def denoiser(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns a frozen denoiser with random weights in a number format."""
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


def make_inputs(
    model: str, net: Any, batch: int, resolution: int
) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
    """Returns the shape of an image's latents, and random values for the text embeddings."""
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
    """Returns a session of the trainer, without a run folder and with random latents."""
    resolution = run.dataset.resolution
    family = FAMILIES[FAMILY[model]]
    net = denoiser(model, device, DTYPES[precision])
    scheduler = json.loads(
        (CONFIGS / model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    )
    vae = SimpleNamespace(config=SimpleNamespace(**VAE[model]))
    parts = {
        "scheduler": getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        "vae": vae,
        family.denoiser_name: net,
    }
    # After caching, the frozen text encoders are no longer in memory.
    parts |= {name: torch.nn.Module() for name in ("text_encoder", "text_encoder_2")}
    shape, conditioning = make_inputs(model, net, run.training.batch_size, resolution)
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
    """Returns a function that does one step as `trainer.training.loop` does."""
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
    """Returns a function that does one step as the LoRA examples of diffusers do."""
    # `choose_device` has set another precision in the shared state.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(options.precision, options.precision),
        cpu=device.type == "cpu",
    )
    net = denoiser(model, device, DTYPES[options.precision])
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    targets += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    adapter = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    net.add_adapter(adapter)
    net.to(device)
    cast_training_params(net, torch.float32)
    parameters = [p for p in net.parameters() if p.requires_grad]
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(parameters, lr=1e-4))
    net.train()
    shape, conditioning = make_inputs(model, net, options.batch, options.resolution)
    inputs = {
        name: tensor.to(device, DTYPES[options.precision]).expand(options.batch, *tensor.shape)
        for name, tensor in conditioning.items()
    }
    latents = torch.randn(options.batch, *shape, device=device)

    def work() -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (options.batch,), device=device)
        noisy = (latents + noise).to(DTYPES[options.precision])
        model_pred = call(model, net, noisy, timesteps, inputs)
        loss = torch.nn.functional.mse_loss(model_pred.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()  # the examples print the loss in every step

    return work


def bare_pass(
    model: str, device: torch.device, options: argparse.Namespace, backward: bool
) -> Callable[[], None]:
    """Returns a function that runs the frozen denoiser without a trainer."""
    dtype = DTYPES[options.precision]
    net = denoiser(model, device, dtype)
    shape, conditioning = make_inputs(model, net, options.batch, options.resolution)
    inputs = {
        name: tensor.to(device, dtype).repeat(options.batch, *[1] * tensor.dim())
        for name, tensor in conditioning.items()
    }
    noisy = torch.randn(options.batch, *shape, device=device, dtype=dtype)
    timesteps = torch.zeros(options.batch, device=device)
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
    """Returns the seconds of one step.

    On CUDA it is the mean of consecutive steps, on a CPU the median processor time.
    """
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


def count_waits(work: Callable[[], None]) -> int:
    """Returns how often the host waits for the GPU within a step, as torch counts it.

    The reading of the step before does not count.
    """
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b), device, 10 if device.type == "cuda" else 3)


def measure(
    model: str, device: torch.device, options: argparse.Namespace, variant: str, rate: float
) -> dict[str, Any]:
    """Measures one row, on a new model that no other variant has changed."""
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
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = psutil.Process().memory_info().rss
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
        "peak_gib": peak / 2**30,
        "setup_seconds": time.perf_counter() - begin - taken * options.repeats,
    }
    session = getattr(work, "session", None)
    if session and isinstance(session.model.predict, GraphedPredict):
        row["graphs"] = len(session.model.predict.graphs)
        row["refusal"] = session.model.predict.refusal
    if device.type == "cuda":
        row["waits"] = count_waits(work)
    if options.profile and device.type == "cuda":
        name = variant.replace(", ", "-").replace(" ", "-")
        write_profile(work, Path(options.profile, f"{model}-{name}.txt"))
    return row


def write_profile(work: Callable[[], None], path: Path) -> None:
    """Writes a table of the kernels of one step."""
    with torch.profiler.profile() as profile:
        work()
        torch.cuda.synchronize()
    text = profile.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=80
    )
    path.write_text(text, encoding="utf-8")


def print_row(row: dict[str, Any]) -> None:
    share = f"{row['share_of_floor']:.0%} of the floor" if row["share_of_floor"] else ""
    waits = f"the host waits {row['waits']} times" if "waits" in row else ""
    print(
        f"{row['model']} {row['resolution']} px x {row['batch']} {row['variant']:22s} "
        f"{row['seconds']:8.4f} s  {row['pictures_per_second']:7.2f}/s  "
        f"{row['peak_gib']:6.2f} GiB  {share} {waits} {row.get('refusal', '')}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=["sd15"], choices=[*FAMILY, []], metavar="sd15 | sdxl | sd35m"
    )
    parser.add_argument(
        "--resolution", type=int, help="pixels (default: the native size of the model)"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, help="default: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:4])
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--profile", help="write a table of the kernels of each row to this folder")
    options = parser.parse_args()
    device = choose_device()
    options.precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rate = matrix_rate(device, DTYPES[options.precision])
    print(
        f"{device_name(device)}, torch {torch.__version__}, "
        f"{options.precision} matrix product {rate / 1e12:.2f} TFLOP/s",
        flush=True,
    )
    chosen_resolution = options.resolution
    # To compare `plain` on a CPU, give one model per call.
    for model in options.models:
        options.resolution = chosen_resolution or NATIVE[model]
        for variant in VARIANTS:
            if variant not in options.only:
                continue
            # `plain` comes first, because these settings change the process for good.
            if variant != "plain":
                configure_libraries()
            row = measure(model, device, options, variant, rate)
            print_row(row)
            keep({"device": device_name(device), "torch": torch.__version__, **row}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
