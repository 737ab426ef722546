"""Cross-field checks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config.settings import Adapter, RunConfig

WITHOUT_FORM = {
    "diffusers": ("loha", "lokr"),
    "peft": ("lokr",),
}  # kinds that a dialect has no exact form for (`trainer/export.py`)
COMPONENTS = (
    "unet",
    "text_encoder",
    "text_encoder_2",
)  # those with a learning rate of their own; a transformer has the UNet's


def check(run: "RunConfig") -> None:
    training = run.training
    if not any(map(training.rate_of, COMPONENTS)):
        raise ValueError(
            "training.learning_rate and training.text_encoder_learning_rate are both 0, so nothing would be trained; set one of them"
        )
    if training.text_encoder_until < 1 and training.learning_rate == 0:
        raise ValueError(
            "training.text_encoder_until would leave nothing to train after that share of the steps, "
            "since training.learning_rate is 0; set it to 1"
        )
    if training.devices > training.batch_size * training.gradient_accumulation_steps:
        raise ValueError(
            f"training.devices ({training.devices}) cannot share a step of {training.batch_size * training.gradient_accumulation_steps} "
            "pictures; raise training.batch_size or training.gradient_accumulation_steps, or use fewer devices"
        )
    if run.base.quantization != "none" and run.adapter.kind not in ("lora", "rslora"):
        raise ValueError(
            f"base.quantization does not go with adapter.kind = {run.adapter.kind}; use lora or rslora"
        )
    if training.warmup >= 1 and not training.warmup.is_integer():
        raise ValueError(
            f"training.warmup ({training.warmup:g}) is neither a share below 1 nor a whole number of steps"
        )
    if training.warmup >= 1 and 0 < training.steps <= training.warmup:
        raise ValueError(
            f"training.warmup: a warm-up of {training.warmup:g} steps does not fit into a run of {training.steps}; shorten it"
        )
    if (training.optimizer == "collection") != bool(training.optimizer_name):
        raise ValueError(
            'training.optimizer_name names the optimiser where training.optimizer is "collection", and only there'
        )
    optimizer = (training.optimizer_name or training.optimizer).lower()
    rates = {training.rate_of(part) for part in COMPONENTS} - {0.0}
    if run.adapter.trigger_vectors:
        rates.add(training.trigger_learning_rate)
    if optimizer == "prodigy" and (len(rates) > 1 or min(rates) < 0.1):
        raise ValueError(
            "the optimiser prodigy finds the learning rate itself and multiplies it with that of the settings: set "
            "training.learning_rate to 1, training.text_encoder_learning_rate to 1 or 0, and so training.trigger_learning_rate, "
            "where adapter.trigger_vectors is set"
        )
    if optimizer.replace("_", "").startswith("schedulefree"):
        if training.lr_schedule != "constant":
            raise ValueError(
                "a schedule-free optimiser takes the place of a schedule: set training.lr_schedule to constant"
            )
        if training.ema_decay:
            raise ValueError(
                "a schedule-free optimiser averages by itself: set training.ema_decay to 0"
            )
    if run.objective.min_timestep >= run.objective.max_timestep:
        raise ValueError(
            f"objective.min_timestep ({run.objective.min_timestep}) is not below objective.max_timestep "
            f"({run.objective.max_timestep}); make the range wider"
        )
    if run.objective.noise_offset_random and not run.objective.noise_offset:
        raise ValueError("objective.noise_offset_random needs an objective.noise_offset above 0")
    if run.base.prediction == "epsilon" and run.base.zero_terminal_snr == "on":
        raise ValueError(
            "base.zero_terminal_snr = on needs v prediction: from pure noise nothing can be told of the noise in a picture; "
            "set base.prediction = v, or base.zero_terminal_snr = off"
        )
    if training.early_stop and not run.dataset.hold_out:
        raise ValueError(
            "training.early_stop looks at the loss on held-out pictures; set dataset.hold_out above 0, such as 0.1"
        )
    if training.early_stop >= run.saving.saves:
        raise ValueError(
            f"training.early_stop ({training.early_stop}) can never end a run with saving.saves = {run.saving.saves}; "
            "make the saves more, or early_stop smaller"
        )
    if run.saving.dialects == ("peft",):
        raise ValueError(
            "saving.dialects is peft alone, a folder; add kohya or diffusers, the file that the page shows and hands out"
        )
    if formless := [
        dialect
        for dialect in run.saving.dialects
        if run.adapter.kind in WITHOUT_FORM.get(dialect, ())
    ]:
        raise ValueError(
            f"saving.dialects: {' and '.join(formless)} cannot hold adapter.kind = {run.adapter.kind}; leave it out, or use lora"
        )
    if run.dataset.random_crop and run.dataset.crop == "none":
        raise ValueError(
            "dataset.random_crop cuts where dataset.crop = none keeps the whole picture; choose one of them"
        )
    if run.objective.prior_preservation and not run.dataset.trigger:
        raise ValueError(
            "objective.prior_preservation compares captions with and without the trigger word; set dataset.trigger"
        )
    if run.adapter.trigger_vectors and not run.dataset.trigger:
        raise ValueError(
            "adapter.trigger_vectors are those of the trigger word; set dataset.trigger"
        )
    if run.adapter.trigger_vectors and not training.trigger_learning_rate:
        raise ValueError(
            "adapter.trigger_vectors learn nothing at training.trigger_learning_rate = 0; raise it, or set them to 0"
        )
    learns_words = run.adapter.trigger_vectors or any(map(training.rate_of, COMPONENTS[1:]))
    if run.dataset.caption_dropout == 1 and learns_words:
        raise ValueError(
            "dataset.caption_dropout = 1 drops every caption, which teaches a text encoder or a trigger's vectors nothing; lower it, "
            "or set training.text_encoder_learning_rate and adapter.trigger_vectors to 0"
        )
    if run.dataset.class_pictures and not (
        run.dataset.regularisation_folder and run.dataset.class_words
    ):
        raise ValueError(
            "dataset.class_pictures needs dataset.regularisation_folder to put them in and dataset.class_words to make them from"
        )
    smallest = min(run.dataset.resolution, *run.dataset.resolutions, 4096)
    if run.dataset.bucket_step > smallest:
        raise ValueError(
            f"dataset.bucket_step ({run.dataset.bucket_step}) is larger than dataset.resolution ({smallest}); make it smaller"
        )
    for problem in _unfit(run.adapter):
        raise ValueError(problem)


def _unfit(adapter: "Adapter") -> Iterator[str]:
    """What of an adapter's settings cannot go together."""
    if adapter.start_from and adapter.init != "default":
        yield f"adapter.init = {adapter.init} does not go with adapter.start_from, which starts with the weights of a file; use default"
    if adapter.init in ("pissa", "olora"):
        for setting in ("rank_dropout", "module_dropout", "max_norm"):
            if getattr(adapter, setting):
                yield f"adapter.{setting} does not go with adapter.init = {adapter.init}, whose layers are not the base without their adapter"
    if adapter.kind in ("loha", "lokr"):
        if adapter.dropout:
            yield f"adapter.dropout does not exist for {adapter.kind}, which has no low-rank input; use adapter.rank_dropout or adapter.module_dropout"
        if adapter.init != "default":
            yield f"adapter.init = {adapter.init} does not exist for {adapter.kind}; use default"
    if adapter.kind == "dora":
        if adapter.rank_dropout or adapter.module_dropout:
            yield "adapter.rank_dropout and adapter.module_dropout do not exist for dora, whose length is worked out from the whole weight; use adapter.dropout"
        if adapter.init in ("pissa", "olora"):
            yield f"adapter.init = {adapter.init} does not go with dora; use default, gaussian or orthogonal"
    if adapter.lokr_factor and adapter.kind != "lokr":
        yield f"adapter.lokr_factor is for adapter.kind = lokr only (it is {adapter.kind}); set it to 0"
    if adapter.trigger_init and not adapter.trigger_vectors:
        yield "adapter.trigger_init is what the trigger's vectors start as; set adapter.trigger_vectors"
    if adapter.target_pattern and adapter.targets != "attention":
        yield "adapter.target_pattern replaces adapter.targets; give one of them only"
