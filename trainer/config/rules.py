"""Checks that concern several settings: a table of (condition, message).

A check of one setting alone is declared with its field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainer.config.settings import RunConfig

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""The components of a pipeline with a learning rate. A transformer uses the rate of the UNet."""

UNSUPPORTED_KINDS = {"diffusers": ("loha", "lokr"), "peft": ("lokr",)}
"""Kinds of adapters that a file format cannot store exactly (see `trainer/lora/writer.py`)."""


class Rule(NamedTuple):
    is_broken: Callable[[RunConfig], object]
    """Returns something true if the settings contradict each other."""
    message: str | Callable[[RunConfig], str]
    """What is wrong and what to do. In a text, {training.steps} is replaced by the value."""

    def text(self, run: RunConfig) -> str:
        """Returns the message with the values of the run."""
        if callable(self.message):
            return self.message(run)
        return self.message.format_map(
            {name: getattr(run, name) for name in type(run).model_fields}
        )


def first_conflict(run: RunConfig) -> str:
    """Returns the message of the first broken rule, or "" if the settings fit together."""
    return next((rule.text(run) for rule in RULES if rule.is_broken(run)), "")


def _optimizer(run: RunConfig) -> str:
    return (run.training.optimizer_name or run.training.optimizer).lower()


def _is_schedule_free(run: RunConfig) -> bool:
    return _optimizer(run).replace("_", "").startswith("schedulefree")


def _learning_rates(run: RunConfig) -> set[float]:
    """Returns the learning rates of everything that is trained."""
    rates = {run.training.rate_of(component) for component in COMPONENTS} - {0.0}
    if run.adapter.trigger_vectors:
        rates.add(run.training.trigger_learning_rate)
    return rates


def _trains_text(run: RunConfig) -> bool:
    """Returns whether a text encoder or the vectors of the trigger word are trained."""
    rates = map(run.training.rate_of, COMPONENTS[1:])
    return run.adapter.trigger_vectors > 0 or any(rates)


def _smallest_resolution(run: RunConfig) -> int:
    return min((run.dataset.resolution, *run.dataset.resolutions))


def _unsupported_formats(run: RunConfig) -> list[str]:
    return [
        file_format
        for file_format in run.saving.dialects
        if run.adapter.kind in UNSUPPORTED_KINDS.get(file_format, ())
    ]


def _factorized_init_rule(setting: str) -> Rule:
    """Returns the rule against a setting that scales or switches off the adapter's weights."""
    return Rule(
        lambda run: run.adapter.init in ("pissa", "olora") and getattr(run.adapter, setting),
        f"adapter.{setting} does not go with adapter.init = {{adapter.init}}, which moves a "
        "part of the base model's weights into the adapter, so its layers need the whole adapter. "
        f"Set adapter.{setting} to 0, or adapter.init to default.",
    )


TRAINING_RULES = (
    Rule(
        lambda run: not any(map(run.training.rate_of, COMPONENTS)),
        "training.learning_rate and training.text_encoder_learning_rate are both 0, so nothing "
        "would be trained. Set one of them above 0.",
    ),
    Rule(
        lambda run: run.training.text_encoder_until < 1 and run.training.learning_rate == 0,
        "training.text_encoder_until = {training.text_encoder_until:g} leaves nothing to train "
        "after that fraction of the steps, because training.learning_rate is 0. Set "
        "training.text_encoder_until to 1.",
    ),
    Rule(
        lambda run: run.training.devices > run.training.images_per_step,
        "training.devices: {training.devices} devices cannot share a step of "
        "{training.images_per_step} images. Raise training.batch_size or "
        "training.gradient_accumulation_steps, or use fewer devices.",
    ),
    Rule(
        lambda run: run.base.quantization != "none" and run.adapter.kind not in ("lora", "rslora"),
        "base.quantization = {base.quantization} does not go with adapter.kind = {adapter.kind}; "
        "use lora or rslora, or set base.quantization to none.",
    ),
    Rule(
        lambda run: run.training.warmup >= 1 and not run.training.warmup.is_integer(),
        "training.warmup = {training.warmup:g} is neither a fraction below 1 nor a whole number "
        "of steps. Choose one of them.",
    ),
    Rule(
        lambda run: run.training.warmup >= 1 and 0 < run.training.steps <= run.training.warmup,
        "training.warmup: a warm-up of {training.warmup:g} steps does not fit into a run of "
        "{training.steps} steps. Make the warm-up shorter.",
    ),
    Rule(
        lambda run: (run.training.optimizer == "collection") != bool(run.training.optimizer_name),
        "training.optimizer_name is given if and only if training.optimizer is collection. "
        "Change one of them.",
    ),
    Rule(
        lambda run: (
            _optimizer(run) == "prodigy"
            and (len(_learning_rates(run)) > 1 or min(_learning_rates(run)) < 0.1)
        ),
        "The optimiser prodigy finds the learning rate itself, and multiplies it by the learning "
        "rate of the settings. Set training.learning_rate to 1 and "
        "training.text_encoder_learning_rate to 1 or 0. With adapter.trigger_vectors, set "
        "training.trigger_learning_rate to 1 too.",
    ),
    Rule(
        lambda run: _is_schedule_free(run) and run.training.lr_schedule != "constant",
        "A schedule-free optimiser replaces the schedule. Set training.lr_schedule to constant.",
    ),
    Rule(
        lambda run: _is_schedule_free(run) and run.training.ema_decay,
        "A schedule-free optimiser averages the weights by itself. Set training.ema_decay to 0.",
    ),
)

OBJECTIVE_RULES = (
    Rule(
        lambda run: run.objective.min_timestep >= run.objective.max_timestep,
        "objective.min_timestep ({objective.min_timestep}) is not below objective.max_timestep "
        "({objective.max_timestep}). Make the range wider.",
    ),
    Rule(
        lambda run: run.objective.noise_offset_random and not run.objective.noise_offset,
        "objective.noise_offset_random needs an objective.noise_offset above 0. Raise it, or "
        "switch objective.noise_offset_random off.",
    ),
    Rule(
        lambda run: run.base.prediction == "epsilon" and run.base.zero_terminal_snr == "on",
        "base.zero_terminal_snr = on needs v prediction: a step of pure noise contains nothing "
        "from which epsilon could be learned. Set base.prediction to v, or "
        "base.zero_terminal_snr to off.",
    ),
)

SAVING_RULES = (
    Rule(
        lambda run: run.training.early_stop and not run.dataset.hold_out,
        "training.early_stop needs a validation set. Set dataset.hold_out above 0, such as 0.1.",
    ),
    Rule(
        lambda run: run.training.early_stop >= run.saving.saves,
        "training.early_stop = {training.early_stop} can never end a run with saving.saves = "
        "{saving.saves}. Raise saving.saves, or lower training.early_stop.",
    ),
    Rule(
        lambda run: run.saving.dialects == ("peft",),
        "saving.dialects contains only peft, which is a folder. Add kohya or diffusers, the file "
        "that the page shows and downloads.",
    ),
    Rule(
        _unsupported_formats,
        lambda run: (
            f"saving.dialects: {' and '.join(_unsupported_formats(run))} cannot hold adapter.kind "
            f"= {run.adapter.kind}. Leave the format out, or use lora."
        ),
    ),
)

DATASET_RULES = (
    Rule(
        lambda run: run.dataset.random_crop and run.dataset.crop == "none",
        "dataset.random_crop crops images, and dataset.crop = none keeps them whole. Choose one "
        "of them.",
    ),
    Rule(
        lambda run: run.objective.prior_preservation and not run.dataset.trigger,
        "objective.prior_preservation compares captions with and without the trigger word. Set "
        "dataset.trigger, or set objective.prior_preservation to 0.",
    ),
    Rule(
        lambda run: run.adapter.trigger_vectors and not run.dataset.trigger,
        "adapter.trigger_vectors = {adapter.trigger_vectors} needs a trigger word. Set "
        "dataset.trigger, or set adapter.trigger_vectors to 0.",
    ),
    Rule(
        lambda run: run.adapter.trigger_vectors and not run.training.trigger_learning_rate,
        "adapter.trigger_vectors = {adapter.trigger_vectors} learns nothing, because "
        "training.trigger_learning_rate is 0. Raise it, or set adapter.trigger_vectors to 0.",
    ),
    Rule(
        lambda run: run.dataset.caption_dropout == 1 and _trains_text(run),
        "dataset.caption_dropout = 1 drops every caption, so a text encoder or the vectors of a "
        "trigger word learn nothing. Lower it, or set training.text_encoder_learning_rate and "
        "adapter.trigger_vectors to 0.",
    ),
    Rule(
        lambda run: (
            run.dataset.class_pictures
            and not (run.dataset.regularisation_folder and run.dataset.class_words)
        ),
        "dataset.class_pictures = {dataset.class_pictures} needs dataset.regularisation_folder "
        "for the images and dataset.class_words as their prompt. Set both.",
    ),
    Rule(
        lambda run: run.dataset.bucket_step > _smallest_resolution(run),
        lambda run: (
            f"dataset.bucket_step ({run.dataset.bucket_step}) is larger than the smallest "
            f"resolution ({_smallest_resolution(run)}). Make dataset.bucket_step smaller."
        ),
    ),
)

ADAPTER_RULES = (
    Rule(
        lambda run: run.adapter.start_from and run.adapter.init != "default",
        "adapter.init = {adapter.init} does not go with adapter.start_from, which starts with the "
        "weights of a file. Set adapter.init to default.",
    ),
    _factorized_init_rule("rank_dropout"),
    _factorized_init_rule("module_dropout"),
    _factorized_init_rule("max_norm"),
    Rule(
        lambda run: run.adapter.kind in ("loha", "lokr") and run.adapter.dropout,
        "adapter.dropout does not exist for {adapter.kind}, which has no low-rank input. Use "
        "adapter.rank_dropout or adapter.module_dropout.",
    ),
    Rule(
        lambda run: run.adapter.kind in ("loha", "lokr") and run.adapter.init != "default",
        "adapter.init = {adapter.init} does not exist for {adapter.kind}. Set it to default.",
    ),
    Rule(
        lambda run: (
            run.adapter.kind == "dora" and (run.adapter.rank_dropout or run.adapter.module_dropout)
        ),
        "adapter.rank_dropout and adapter.module_dropout do not exist for dora, which computes "
        "its magnitudes from the whole weight. Use adapter.dropout.",
    ),
    Rule(
        lambda run: run.adapter.kind == "dora" and run.adapter.init in ("pissa", "olora"),
        "adapter.init = {adapter.init} does not go with dora. Use default, gaussian or orthogonal.",
    ),
    Rule(
        lambda run: run.adapter.lokr_factor and run.adapter.kind != "lokr",
        "adapter.lokr_factor is for adapter.kind = lokr only, and the kind is {adapter.kind}. Set "
        "adapter.lokr_factor to 0.",
    ),
    Rule(
        lambda run: run.adapter.trigger_init and not run.adapter.trigger_vectors,
        "adapter.trigger_init is the start of adapter.trigger_vectors, which are 0. Raise them, or "
        "leave adapter.trigger_init empty.",
    ),
    Rule(
        lambda run: run.adapter.target_pattern and run.adapter.targets != "attention",
        "adapter.target_pattern replaces adapter.targets; give one of them only.",
    ),
)

RULES = TRAINING_RULES + OBJECTIVE_RULES + SAVING_RULES + DATASET_RULES + ADAPTER_RULES
"""All rules. Only the first broken one is reported, so later rules may rely on earlier ones."""
