"""A training in memory: its data, its model and its optimiser, and how they are put together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

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
from trainer.models.cpu_threads import Threads
from trainer.models.device import DTYPES, device_name
from trainer.models.pipelines import DENOISERS
from trainer.runs.events import EventLog, Started, Warned
from trainer.training import estimate
from trainer.training.distributed import World
from trainer.training.lr_schedules import warmup_steps
from trainer.training.oom_fallbacks import Fallbacks
from trainer.training.optimizers import build_optimizer, try_optimizer
from trainer.training.step.cuda_graphs import GraphedPredict

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class TrainingData:
    """Everything that is learned from, encoded."""

    examples: list[Example]
    validation: list[Example]
    """The validation set. A dataset that is too small to be split is its own validation set."""
    class_examples: list[Example]
    """Images of the subject's class (regularisation images), or empty."""
    texts: dict[str, Conditioning] | None
    """Conditioning of every caption that can occur, without a batch dimension. None if the text
    encoders run in every step."""

    @cached_property
    def buckets(self) -> list[list[int]]:
        """Indices into `examples` by shape."""
        return shape_buckets(self.examples)

    @cached_property
    def class_buckets(self) -> list[list[int]]:
        """Indices into `class_examples` by shape."""
        return shape_buckets(self.class_examples)

    def fingerprints(self) -> dict[str, str]:
        """Returns a fingerprint of each image at each resolution, to notice a changed dataset."""
        found = {}
        for example in [*self.examples, *self.validation]:
            found[f"{example.name} at {example.resolution}"] = example.fingerprint
        for example in self.class_examples:
            found[f"class picture {example.name} at {example.resolution}"] = example.fingerprint
        return found


@dataclass(frozen=True)
class TrainedModel:
    """The base model with its adapter."""

    base: LoadedBase
    objective: Objective
    components: dict[str, nn.Module]
    """The adapted parts of the base by pipeline name: {"unet": ..., "text_encoder": ...}."""
    trigger: Embedding | None
    """The trigger word's vectors, if they are trained."""
    predict: Callable[[Noised, Batch], Tensor]
    """The family's prediction by the denoiser, as CUDA graphs if possible."""
    attention: str
    """The attention implementation and why it was chosen, for the user."""


@dataclass
class Optimisation:
    """What changes the weights. The 8-bit fallback replaces the optimiser during a run."""

    groups: dict[str, Parameters]
    """`parameter_groups`, collected once: walking through a large denoiser takes milliseconds."""
    optimizer: torch.optim.Optimizer
    average: EMAModel | None
    """Moving average of `parameters`, in their order."""
    is_8bit_fallback: bool = False
    """Whether 8-bit Adam replaced the optimiser because memory ran out."""

    @cached_property
    def parameters(self) -> Parameters:
        """All trained parameters by name, in the order of the optimiser's groups."""
        return {name: p for group in self.groups.values() for name, p in group.items()}


@dataclass
class Session:
    """A training in memory."""

    run: RunConfig
    folder: Path
    log: EventLog
    world: World
    device: torch.device
    precision: str
    total_steps: int
    fallbacks: Fallbacks
    data: TrainingData
    model: TrainedModel
    optimisation: Optimisation
    threads: Threads | None = None
    """How many CPU threads compute, and why. None leaves the number to torch."""

    @property
    def saved_parameters(self) -> dict[str, Tensor]:
        """What a checkpoint contains of the adapter.

        These are the trained parameters, and initial weights that are subtracted at export.
        """
        starts = {
            f"{part}.{name}": tensor
            for part, module in self.model.components.items()
            for name, tensor in inject.initial_factors(module).items()
        }
        return self.optimisation.parameters | starts

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """Encodes captions on the device, with gradients if the caller has enabled them."""
        conditioning = self.model.base.encode(captions)
        return {name: tensor.to(self.device) for name, tensor in conditioning.items()}

    def learns(self, component: str, step: int) -> bool:
        """Returns whether a component is trained in a step.

        Text encoders may stop before the denoiser (`training.text_encoder_until`).
        """
        if component in DENOISERS:
            return True
        return step <= math.ceil(self.run.training.text_encoder_until * self.total_steps)


def shape_buckets(examples: Sequence[Example]) -> list[list[int]]:
    """Returns the indices of the examples of each shape, each as often as it is repeated."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        shapes.setdefault(tuple(example.mean.shape), []).extend([index] * example.repeats)
    return [shapes[shape] for shape in sorted(shapes)]


class AdapterPlan(NamedTuple):
    """Which parts of the base get an adapter, and with which settings."""

    components: dict[str, nn.Module]
    settings: config.Adapter
    start_from: AdapterFile | None


def plan_adapter(run: RunConfig, base: LoadedBase) -> AdapterPlan:
    """Chooses the components to train. Raises TrainerError if the settings do not fit the base."""
    family, training = base.family, run.training
    parts = {family.denoiser_name: base.denoiser, **family.trainable_text_encoders(base.pipe)}
    components = {name: module for name, module in parts.items() if training.rate_of(name) > 0}
    if not components:
        raise ConfigError(
            f"Nothing would be trained: {base.files.path.name} has only {', '.join(parts)}, "
            "and their learning rates are 0."
        )
    if family.default_format == "diffusers" and run.adapter.kind not in ("lora", "rslora"):
        raise ConfigError(
            f"adapter.kind = {run.adapter.kind} has no file format that programs read for "
            f"{family.name}; use lora or rslora there."
        )
    shapes = {name: inject.weight_shapes(module) for name, module in components.items()}
    check_names(run.adapter, shapes)
    if not run.adapter.start_from:
        return AdapterPlan(components, run.adapter, None)
    file = read_adapter(Path(run.adapter.start_from).expanduser())
    return AdapterPlan(components, settings_from(run.adapter, file, base), file)


def build_session(
    run: RunConfig,
    folder: Path,
    log: EventLog,
    fallbacks: Fallbacks,
    world: World,
    device: torch.device,
    precision: str,
    base: LoadedBase,
    data: TrainingData,
    threads: Threads | None = None,
) -> Session:
    """Adds the adapter to a loaded base, moves it to the device and makes the optimiser."""
    model, groups = _build_model(run, fallbacks, device, precision, base)
    total_steps = estimate.total_steps(run, sum(example.repeats for example in data.examples))
    warmup_steps(run, total_steps)  # raises ConfigError if the warm-up does not fit
    optimisation = Optimisation(groups, optimizer_for(run, groups, device, log), average=None)
    if run.training.ema_decay:
        parameters = optimisation.parameters.values()
        optimisation.average = EMAModel(parameters, decay=run.training.ema_decay)
    return Session(
        run=run,
        folder=folder,
        log=log,
        world=world,
        device=device,
        precision=precision,
        total_steps=total_steps,
        fallbacks=fallbacks,
        data=data,
        model=model,
        optimisation=optimisation,
        threads=threads,
    )


def _build_model(
    run: RunConfig,
    fallbacks: Fallbacks,
    device: torch.device,
    precision: str,
    base: LoadedBase,
) -> tuple[TrainedModel, dict[str, Parameters]]:
    attention, attention_text = choose_attention(base.denoiser, device, DTYPES[precision])
    use_attention(base.denoiser, attention)

    # The plan compares stored weights, so it comes before quantisation changes them.
    components, adapter, start_from = plan_adapter(run, base)
    if run.base.quantization != "none":
        quantization.quantize(base.denoiser, run.base.quantization, DTYPES[precision], device)
        # bitsandbytes rounds the weights on the move to the device, before they get an adapter.
        fallbacks.attempt("load", 0, lambda: base.denoiser.to(device))

    for name, module in components.items():
        inject.inject(module, name, adapter, run.training.seed)
    if start_from:
        load_weights(start_from, components)
    if run.training.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    trigger = None
    if run.adapter.trigger_vectors:
        trigger = textual_inversion.new_trigger_embedding(run, base)
        base = textual_inversion.with_embeddings(base, [trigger])

    # The fastest memory layout for convolutions differs between devices.
    if device.type == "cpu":
        use_matrix_products(base.denoiser)
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    fallbacks.attempt("load", 0, lambda: base.denoiser.to(device, memory_format=layout))
    predict: Callable[[Noised, Batch], Tensor] = partial(base.family.predict, base.denoiser)
    if device.type == "cuda" and run.training.cuda_graphs and _can_use_cuda_graphs(run):
        predict = GraphedPredict(base.family, base.denoiser)
    objective = base.family.objective(base.pipe).to(device)
    model = TrainedModel(base, objective, components, trigger, predict, attention_text)
    return model, parameter_groups(components, trigger)


def _can_use_cuda_graphs(run: RunConfig) -> bool:
    """Returns False if a step draws numbers or copies on the host.

    A graph would record the first draw and repeat it forever.
    """
    adapter = run.adapter
    draws = adapter.dropout or adapter.rank_dropout or adapter.module_dropout
    return not (draws or run.training.activation_offload or run.base.quantization != "none")


def parameter_groups(
    components: Mapping[str, nn.Module], trigger: Embedding | None
) -> dict[str, Parameters]:
    """Returns the trained parameters by component (each has a learning rate), then by name."""
    groups: dict[str, Parameters] = {}
    for part, module in components.items():
        trainable = inject.trainable(module)
        groups[part] = {f"{part}.{name}": parameter for name, parameter in trainable.items()}
    if trigger:
        groups["trigger"] = {f"trigger.{part}": rows for part, rows in trigger.rows.items()}
    return groups


def optimizer_for(
    run: RunConfig,
    groups: Mapping[str, Mapping[str, nn.Parameter]],
    device: torch.device,
    log: EventLog,
) -> torch.optim.Optimizer:
    """Returns the optimiser of the settings for the `parameter_groups`, after a test.

    If 8-bit AdamW does not work on this machine, AdamW replaces it: both take the same steps.
    Raises ConfigError or ImportError if another optimiser does not work.
    """
    try:
        try_optimizer(run, device)
    except (ImportError, OSError, RuntimeError, ConfigError) as error:
        if run.training.optimizer != "adamw8bit":
            raise
        log.append(
            Warned(
                f"adamw8bit cannot be used here ({str(error)[:200]}); "
                "adamw is used, with the same steps and more memory."
            )
        )
        run = config.replace(run, {"training.optimizer": "adamw"})
    rated = [(list(group.values()), run.training.rate_of(name)) for name, group in groups.items()]
    return build_optimizer(rated, run)


def started_event(session: Session, step: int) -> Started:
    """Returns the event that describes the run to the page and the terminal."""
    run, model, data = session.run, session.model, session.data
    names = {example.name for example in data.examples}
    validation_names = {example.name for example in data.validation}
    devices = f"{session.world.size} x " if session.world.size > 1 else ""
    return Started(
        step=step,
        total_steps=session.total_steps,
        pictures=len(names),
        held_out=len(validation_names - names),
        trainable_parameters=sum(p.numel() for p in session.optimisation.parameters.values()),
        parameters={
            name: sum(p.numel() for p in inject.trainable(module).values())
            for name, module in model.components.items()
        },
        base_parameters={
            name: estimate.base_parameters(model.base.files, name) for name in model.components
        },
        device=devices + device_name(session.device, session.threads),
        precision=session.precision,
        attention=model.attention,
        family=model.base.family.name,
        saves=run.saving.saves,
        images_per_step=run.training.images_per_step,
        threads=session.threads.count if session.threads and session.device.type == "cpu" else 0,
    )
