"""The section [training]."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config import parsers
from trainer.config.settings.section import PositiveInt, Section


class Training(Section):
    """How long and how hard."""

    steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Number of optimiser steps. 0: computed from the number of pictures and the views per picture."""
    views_per_picture: PositiveInt = 80
    """How often each picture is seen, where steps is 0. More learns more closely, and memorises sooner."""
    batch_size: Annotated[int, Field(ge=1, le=256)] = 1
    """Pictures per forward pass. Larger is steadier and uses more memory."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    """Forward passes per optimiser step: the effect of a larger batch without its memory."""
    learning_rate: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """Size of the steps of the adapter in the UNet. 0 leaves the UNet as it is. Too high burns the pictures, too low learns nothing."""
    text_encoder_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same for the text encoder (both, where the base has two). 0 leaves it frozen and out of the file; it then needs no memory either."""
    text_encoder_2_learning_rate: Annotated[float, Field(ge=-1, le=1)] = -1.0
    """For the second text encoder, where the base has two. Below 0: that of the first; 0 leaves it frozen and out of the file."""
    trigger_learning_rate: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """The same for the vectors of the trigger word, with trigger_vectors. They need more than an adapter: 5e-4 to 5e-3."""
    text_encoder_until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the steps after which the text encoders and the trigger's vectors stop learning and stay as they are. 0.5 or less keeps them from memorising."""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        "cosine"
    )
    """How the learning rate moves after the warm-up: stays, or falls to zero along a line, a cosine, several cosines one after the other (Loshchilov & Hutter 2017, arXiv:1608.03983) or a power."""
    lr_cycles: Annotated[int, Field(ge=1, le=1000)] = 3
    """How often the learning rate falls in cosine_with_restarts."""
    lr_power: Annotated[float, Field(gt=0, le=20)] = 2.0
    """Exponent of polynomial: 1 is a line, 2 falls faster at first."""
    warmup: Annotated[float, Field(ge=0, le=1_000_000)] = 0.05
    """How long the learning rate rises from zero: below 1 a share of the steps, from 1 on a number of steps."""
    optimizer: Literal[
        "adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule_free_adamw", "collection"
    ] = "adamw"
    """The rule that turns gradients into steps. adamw suits most. adamw8bit: the same in a quarter of its memory (NVIDIA only, else adamw is used). adafactor: less memory still. lion: give it a third of the learning rate. prodigy finds the learning rate by itself: set it to 1. schedule_free_adamw averages instead of slowing down: use the constant schedule. collection: any of the pytorch-optimizer package, by its name below."""
    optimizer_name: Annotated[str, Field(max_length=40)] = ""
    """Name of the optimiser where collection is chosen, such as came, adopt or soap."""
    optimizer_args: Annotated[
        tuple[Annotated[str, Field(max_length=200), AfterValidator(parsers.checked_argument)], ...],
        Field(max_length=20),
    ] = ()
    """Further arguments of the optimiser, one a line, such as betas=(0.9, 0.99) or eps=1e-6."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """How strongly the optimiser pulls the adapter back to zero (times the learning rate)."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Save, sample and measure a running average of the adapter instead of its last weights: each step keeps this share of the average, less of it early in the run. 0.99 to 0.999 smooths a restless training; 0 switches it off."""
    early_stop: Annotated[int, Field(ge=0, le=99)] = 0
    """Ends the run after this many saves in a row that did not lower the loss on the held-out pictures. 2 or 3 with 8 saves or more; 0 never. Needs pictures that are held out."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients longer than this are shortened to it. 0 switches that off."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: far less memory, about a third slower."""
    activation_offload: bool = False
    """Keep activations in the machine's memory until the backward pass needs them: less memory on the GPU, slower by the way there and back. The numbers stay the same."""
    cuda_graphs: bool = True
    """On an NVIDIA GPU, replay recorded steps instead of launching each operation from Python. A large gain for small pictures and batches; dropout, offloading and quantised bases run without."""
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs of this machine that train as one: they share the pictures of each step, so the result is the same up to rounding. Each step needs at least as many pictures (batch size x accumulation). Without a GPU: processes."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """The same seed, settings and pictures give the same adapter."""

    def rate_of(self, component: str) -> float:
        """The learning rate of a component of the pipeline ("unet", "transformer", "text_encoder", "text_encoder_2"), or of the "trigger"."""
        if component == "trigger":
            return self.trigger_learning_rate
        if not component.startswith("text_encoder"):
            return self.learning_rate
        own = self.text_encoder_2_learning_rate if component == "text_encoder_2" else -1.0
        return self.text_encoder_learning_rate if own < 0 else own
