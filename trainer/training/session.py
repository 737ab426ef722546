"""A training in memory, and how it is put together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from trainer import config
from trainer.config import RunConfig
from trainer.data.examples import Example
from trainer.errors import ConfigError
from trainer.families import LoadedBase
from trainer.families.base import Batch, Conditioning
from trainer.families.objective import Noised, Objective
from trainer.lora import inject, textual_inversion
from trainer.lora.formats.reader import AdapterFile, read_adapter
from trainer.lora.targets import check_names
from trainer.lora.textual_inversion import Embedding
from trainer.lora.warm_start import load_weights, settings_from
from trainer.models import quantization
from trainer.models.attention import choose_attention, use_attention
from trainer.models.cpu_conv import use_matrix_products
from trainer.models.device import DTYPES, device_name
from trainer.models.pipelines import DENOISERS
from trainer.runs.events import EventLog, Started, Warned
from trainer.training import estimate
from trainer.training.distributed import World
from trainer.training.oom_fallbacks import Fallbacks
from trainer.training.lr_schedules import warmup_steps
from trainer.training.optimizers import build_optimizer, try_optimizer
from trainer.training.step.cuda_graphs import GraphedPredict


@dataclass
class Session:
    """A training in memory."""

    run: RunConfig
    folder: Path
    log: EventLog
    device: torch.device
    precision: str
    attention: str
    base: LoadedBase
    objective: Objective
    components: dict[str, nn.Module]
    """The adapted parts of the base by their names in the pipeline: {"unet": ..., "text_encoder": ...}."""
    trigger: Embedding | None
    """The trigger word's vectors, where they are learned too."""
    groups: dict[str, dict[str, nn.Parameter]]
    """`parameter_groups`, looked up once: each step asks, and walking through a large denoiser takes many milliseconds."""
    optimizer: torch.optim.Optimizer
    average: EMAModel | None
    """Of the parameters, in their order."""
    examples: list[Example]
    held_out: list[Example]
    class_examples: list[Example]
    """Others of the subject's kind, one beside each picture; empty where there are none."""
    texts: dict[str, Conditioning] | None
    """Of every caption that may occur, without a batch; None where the text encoders run in every step."""
    total_steps: int
    fallbacks: Fallbacks
    predict: Callable[[Noised, Batch], Tensor]
    """The family's, of the denoiser; made faster where that is possible."""
    world: World
    eight_bit: bool = False
    """Whether want of memory took the optimiser to 8 bits."""

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; in the order of the optimiser's groups."""
        return {name: p for group in self.groups.values() for name, p in group.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """What a state holds of the adapter: what is trained, and what it started from where that is not zero."""
        starts = {
            f"{part}.{name}": b
            for part, module in self.components.items()
            for name, b in inject.initial_factors(module).items()
        }
        return self.parameters | starts

    @property
    def buckets(self) -> list[list[int]]:
        return shape_buckets(self.examples)

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """With gradients where the caller has them on."""
        return to_device(self.base.encode(captions), self.device)

    def learns(self, component: str, step: int) -> bool:
        """Whether a component is trained in this step: the text encoders may stop before the denoiser."""
        return component in DENOISERS or step <= math.ceil(
            self.run.training.text_encoder_until * self.total_steps
        )

    def dataset_fingerprints(self) -> dict[str, str]:
        own = {
            f"{e.name} at {e.resolution}": e.fingerprint for e in [*self.examples, *self.held_out]
        }
        return own | {
            f"class picture {e.name} at {e.resolution}": e.fingerprint for e in self.class_examples
        }


def shape_buckets(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the examples of each shape, each as often as it is repeated."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        shapes.setdefault(tuple(example.mean.shape), []).extend([index] * example.repeats)
    return [shapes[shape] for shape in sorted(shapes)]


def to_device(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return {name: tensor.to(device) for name, tensor in conditioning.items()}


def assemble(
    run: RunConfig,
    folder: Path,
    log: EventLog,
    fallbacks: Fallbacks,
    device: torch.device,
    precision: str,
    base: LoadedBase,
    examples: list[Example],
    held_out: list[Example],
    class_examples: list[Example],
    texts: dict[str, Conditioning] | None,
    world: World | None = None,
) -> Session:
    """The second half, where all that is trained on is there: the adapter, the optimiser, and the fastest way through the denoiser."""
    attention, why = choose_attention(base.denoiser, device, DTYPES[precision])
    use_attention(base.denoiser, attention)
    components, adapter, file = _chosen(
        run, base
    )  # told by the weights as they are stored, so before they are quantised
    if run.base.quantization != "none":
        quantization.quantize(base.denoiser, run.base.quantization, DTYPES[precision], device)
        fallbacks.attempt(
            "load", 0, lambda: base.denoiser.to(device)
        )  # there the weights are rounded, before an adapter is put on them
    for name, module in components.items():
        inject.inject(module, name, adapter, run.training.seed)
    if file:
        load_weights(file, components)
    if run.training.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    trigger = textual_inversion.new_trigger_embedding(run, base) if run.adapter.trigger_vectors else None
    base = textual_inversion.with_embeddings(base, [trigger]) if trigger else base
    if device.type == "cpu":
        use_matrix_products(base.denoiser)
    layout = (
        torch.channels_last if device.type == "cuda" else torch.preserve_format
    )  # what its convolutions are fastest in
    fallbacks.attempt("load", 0, lambda: base.denoiser.to(device, memory_format=layout))
    views = sum(example.repeats for example in examples)
    total_steps = estimate.total_steps(run, views)
    warmup_steps(run, total_steps)
    graphed = device.type == "cuda" and run.training.cuda_graphs and _can_be_recorded(run)
    groups = parameter_groups(components, trigger)
    parameters = [p for group in groups.values() for p in group.values()]
    return Session(
        run=run,
        folder=folder,
        log=log,
        device=device,
        precision=precision,
        attention=why,
        base=base,
        objective=base.family.objective(base.pipe).to(device),
        components=components,
        trigger=trigger,
        groups=groups,
        optimizer=optimizer_for(run, groups, device, log),
        average=EMAModel(parameters, decay=run.training.ema_decay)
        if run.training.ema_decay
        else None,
        examples=examples,
        held_out=held_out,
        class_examples=class_examples,
        texts=texts,
        total_steps=total_steps,
        fallbacks=fallbacks,
        predict=GraphedPredict(base.family, base.denoiser)
        if graphed
        else partial(base.family.predict, base.denoiser),
        world=world or World(),
    )


def _can_be_recorded(run: RunConfig) -> bool:
    """Draws and copies on the CPU's side would happen once, while a graph is recorded, and never again."""
    adapter = run.adapter
    draws = adapter.dropout or adapter.rank_dropout or adapter.module_dropout
    return not (draws or run.training.activation_offload or run.base.quantization != "none")


def _chosen(
    run: RunConfig, base: LoadedBase
) -> tuple[dict[str, nn.Module], config.Adapter, AdapterFile | None]:
    """What gets an adapter, with which settings, and the file that it goes on from. Raises TrainerError."""
    family, training = base.family, run.training
    parts = {family.denoiser_name: base.denoiser, **family.trainable_text_encoders(base.pipe)}
    components = {name: module for name, module in parts.items() if training.rate_of(name) > 0}
    if not components:
        raise ConfigError(
            f"Nothing would be trained: {base.files.path.name} has only {', '.join(parts)}, and their learning rates are 0."
        )
    if family.dialect == "diffusers" and run.adapter.kind not in ("lora", "rslora"):
        raise ConfigError(
            f"adapter.kind = {run.adapter.kind} has no file format that programs read for {family.name}; use lora or rslora there."
        )
    check_names(
        run.adapter, {name: inject.weight_shapes(module) for name, module in components.items()}
    )
    file = (
        read_adapter(Path(run.adapter.start_from).expanduser()) if run.adapter.start_from else None
    )
    return components, settings_from(run.adapter, file, base) if file else run.adapter, file


def parameter_groups(
    components: Mapping[str, nn.Module], trigger: Embedding | None
) -> dict[str, dict[str, nn.Parameter]]:
    """What is trained, by what has a learning rate of its own, and by name."""
    groups = {
        part: {f"{part}.{name}": p for name, p in inject.trainable(module).items()}
        for part, module in components.items()
    }
    return groups | (
        {"trigger": {f"trigger.{part}": rows for part, rows in trigger.rows.items()}}
        if trigger
        else {}
    )


def optimizer_for(
    run: RunConfig,
    groups: Mapping[str, Mapping[str, nn.Parameter]],
    device: torch.device,
    log: EventLog,
) -> torch.optim.Optimizer:
    """The chosen one, tried out first, for the `parameter_groups`. AdamW in 8 bits alone has a stand-in, since it takes the same steps."""
    try:
        try_optimizer(run, device)
    except (ImportError, OSError, RuntimeError, ConfigError) as error:
        if run.training.optimizer != "adamw8bit":
            raise
        log.append(
            Warned(
                f"adamw8bit cannot be used here ({str(error)[:200]}); adamw is used, with the same steps and more memory."
            )
        )
        run = config.replace(run, {"training.optimizer": "adamw"})
    return build_optimizer(
        [(list(group.values()), run.training.rate_of(name)) for name, group in groups.items()], run
    )


def started_event(session: Session, step: int) -> Started:
    return Started(
        step=step,
        total_steps=session.total_steps,
        pictures=len(names := {e.name for e in session.examples}),
        held_out=len({e.name for e in session.held_out} - names),
        trainable_parameters=sum(p.numel() for p in session.parameters.values()),
        parameters={
            name: sum(p.numel() for p in inject.trainable(module).values())
            for name, module in session.components.items()
        },
        base_parameters={
            name: estimate.base_parameters(session.base.files, name) for name in session.components
        },
        device=f"{session.world.size} x " * (session.world.size > 1) + device_name(session.device),
        precision=session.precision,
        attention=session.attention,
        family=session.base.family.name,
        saves=session.run.saving.saves,
        images_per_step=session.run.training.batch_size
        * session.run.training.gradient_accumulation_steps,
    )
