"""The section [training] of the settings."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config import parsers
from trainer.config.settings.section import Section


class Training(Section):
    """Length of the run, learning rates, optimiser, memory and speed."""

    steps: int = Field(default=0, title="Max train steps", ge=0, le=1_000_000)
    """Number of optimiser steps. 0: computed from the number of images and the epochs."""

    views_per_picture: int = Field(default=80, title="Epochs (views per image)", ge=1)
    """How often each image is seen, if the number of steps is 0. More views learn more closely,
    but memorise sooner."""

    batch_size: int = Field(default=1, title="Train batch size", ge=1, le=256)
    """Images per forward pass. A larger batch is steadier and needs more memory."""

    gradient_accumulation_steps: int = Field(
        default=1, title="Gradient accumulation steps", ge=1, le=1024
    )
    """Forward passes per optimiser step: the effect of a larger batch without its memory."""

    learning_rate: float = Field(default=1e-4, title="Learning rate", ge=0, le=1)
    """Learning rate of the UNet, or of the transformer of Stable Diffusion 3. If it is too high,
    samples burn out; if it is too low, the adapter learns nothing. 0 leaves the UNet
    untrained."""

    text_encoder_learning_rate: float = Field(
        default=0.0, title="Text encoder learning rate", ge=0, le=1
    )
    """Learning rate of the text encoder, or of both if the base model has two. 0 leaves it
    untrained and out of the file, and saves its memory."""

    text_encoder_2_learning_rate: float = Field(
        default=-1.0, title="Text encoder 2 learning rate", ge=-1, le=1
    )
    """Learning rate of the second text encoder, if the base model has two. Below 0: as for the
    first. 0 leaves it untrained and out of the file."""

    trigger_learning_rate: float = Field(default=1e-3, title="Embedding learning rate", ge=0, le=1)
    """Learning rate of the vectors of the trigger word, if there are any. They need a higher rate
    than an adapter: 5e-4 to 5e-3."""

    text_encoder_until: float = Field(default=1.0, title="Stop text encoder training", gt=0, le=1)
    """Fraction of the steps after which the text encoders and the vectors of the trigger word are
    frozen. 0.5 or less keeps them from memorising."""

    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        Field(default="cosine", title="LR scheduler")
    )
    """How the learning rate changes after the warm-up. constant: not at all. The others fall to
    zero: linear along a line, cosine along a cosine, cosine_with_restarts along several cosines
    in a row (Loshchilov & Hutter 2017, arXiv:1608.03983), polynomial along a power."""

    lr_cycles: int = Field(default=3, title="LR number of cycles", ge=1, le=1000)
    """With cosine_with_restarts: how often the learning rate falls to zero."""

    lr_power: float = Field(default=2.0, title="LR power", gt=0, le=20)
    """With polynomial: the exponent. 1 is a line, 2 falls faster at first."""

    warmup: float = Field(default=0.05, title="LR warmup", ge=0, le=1_000_000)
    """How long the learning rate rises from zero. Below 1: a fraction of the steps. From 1 on: a
    number of steps."""

    optimizer: Literal[
        "adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule_free_adamw", "collection"
    ] = Field(default="adamw", title="Optimizer")
    """adamw suits most runs. adamw8bit: the same with a quarter of its memory (NVIDIA only;
    otherwise adamw is used). adafactor: even less memory. lion: needs a third of the learning
    rate. prodigy: finds the learning rate itself; set it to 1. schedule_free_adamw: averages
    weights instead of lowering the learning rate; use the constant schedule. collection: any
    optimiser of the pytorch-optimizer package, by the name below."""

    optimizer_name: str = Field(default="", title="Optimizer from the collection", max_length=40)
    """With collection: the name of the optimiser, such as came, adopt or soap."""

    optimizer_args: tuple[
        Annotated[str, Field(max_length=200), AfterValidator(parsers.checked_argument)], ...
    ] = Field(default=(), title="Optimizer extra arguments", max_length=20)
    """More arguments of the optimiser, one per line, such as betas=(0.9, 0.99) or eps=1e-6."""

    weight_decay: float = Field(default=0.01, title="Weight decay", ge=0, le=1)
    """How strongly the optimiser pulls the adapter's weights to zero (times the learning
    rate)."""

    ema_decay: float = Field(default=0.0, title="EMA decay", ge=0, lt=1)
    """Saves, samples and validates an exponential moving average of the weights instead of the
    last weights. Each step keeps this fraction of the average, and less of it early in the run.
    0.99 to 0.999 smooths an unsteady training; 0 switches it off."""

    early_stop: int = Field(default=0, title="Early stopping patience", ge=0, le=99)
    """Ends the run after this many saves in a row without a lower validation loss. 2 or 3, with
    at least 8 saves; 0 switches it off. Needs a validation set."""

    max_grad_norm: float = Field(default=1.0, title="Max gradient norm", ge=0)
    """Gradients with a larger norm are clipped to it. 0 switches clipping off."""

    gradient_checkpointing: bool = Field(default=False, title="Gradient checkpointing")
    """Recomputes activations in the backward pass instead of storing them: far less memory, about
    a third slower."""

    activation_offload: bool = Field(default=False, title="Offload activations")
    """Stores activations in the CPU's memory until the backward pass needs them: less GPU memory,
    but slower because of the copies. The results are identical."""

    cuda_graphs: bool = Field(default=True, title="CUDA graphs")
    """On an NVIDIA GPU, replays recorded steps instead of launching each operation from Python.
    Much faster with small images and batches. Not used with dropout, offloading or
    quantization."""

    devices: int = Field(default=1, title="Number of GPUs", ge=1, le=64)
    """How many GPUs of this machine train together. They share the images of each step, so the
    result is the same up to rounding. Each step needs at least this many images (batch size x
    accumulation). Without a GPU: the number of processes."""

    seed: int = Field(default=42, title="Seed", ge=0, le=2**32 - 1)
    """The same seed, settings and images give the same adapter."""

    @property
    def images_per_step(self) -> int:
        """Training images for each optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps

    def rate_of(self, component: str) -> float:
        """Returns the learning rate of a component of the pipeline, or of the "trigger".

        Components: "unet", "transformer", "text_encoder" and "text_encoder_2".
        """
        if component == "trigger":
            return self.trigger_learning_rate
        if component == "text_encoder_2" and self.text_encoder_2_learning_rate >= 0:
            return self.text_encoder_2_learning_rate
        if component.startswith("text_encoder"):
            return self.text_encoder_learning_rate
        return self.learning_rate
