"""Every knob of a run, each declared once: type, bounds, default and help in one field.

The form on the page, `--set` on the command line, the presets, the docs and the metadata of the
finished file are generated from here. The docstring under a field is its help everywhere.
A config holds no derived value, no code path and no tensor; `load(save(config)) == config`.
"""

import ast
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import regex
import tomlkit
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from trainer.errors import ConfigError

EMBEDDED = "embedded"  # the name under which the base model that ships with the program is chosen

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def optimizer_arguments(lines: Iterable[str]) -> dict[str, Any]:
    """("betas=(0.9, 0.99)", "eps=1e-6") -> {"betas": (0.9, 0.99), "eps": 1e-06}. Only literals: a config can come from a stranger."""
    found: dict[str, Any] = {}
    for line in lines:
        name, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"{line!r} is not of the form name=value, such as betas=(0.9, 0.99)")
        if name in ("lr", "params", "weight_decay") or name in found:
            raise ValueError(
                f"{name} " + ("is given twice" if name in found else "has a field of its own")
            )
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise ValueError(
                f"the value of {name} is no number, True, False, None, text in quotes or (list, of, such)"
            ) from None
    return found


def folder_repeats(lines: Iterable[str]) -> dict[str, int]:
    """("closeups = 3",) -> {"closeups": 3}."""
    found = {}
    for line in lines:
        name, equals, count = (part.strip() for part in line.rpartition("="))
        if not equals or not name or not re.fullmatch(r"[1-9]\d{0,2}", count):
            raise ValueError(f"{line!r} is not of the form folder = number, such as closeups = 3")
        found[name.strip("/") or "."] = int(count)
    return found


def _checked_repeats(line: str) -> str:
    folder_repeats([line])
    return line


def _checked_argument(line: str) -> str:
    optimizer_arguments([line])
    return line


def numbers_by_name(text: str) -> dict[str, float]:
    """ "mid_block=32, attn2=8" -> {"mid_block": 32.0, "attn2": 8.0}. Raises ValueError with how to write it."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = regex.fullmatch(r"([A-Za-z_][\w.]*)\s*=\s*(\d+(?:\.\d+)?)", part)
        if not match or not float(match[2]) <= 4096:
            raise ValueError(
                f"write it as mid_block=32, attn2=8 (a name, =, a number up to 4096); {part[:40]!r} is something else"
            )
        found[match[1]] = float(match[2])
    return found


def _ranks(text: str) -> str:
    if any(value != int(value) or value > 512 for value in numbers_by_name(text).values()):
        raise ValueError("ranks are whole numbers up to 512")
    return text


def _alphas(text: str) -> str:
    if not all(numbers_by_name(text).values()):
        raise ValueError("an alpha is above 0; to leave a part out, set its rank to 0")
    return text


def _pattern(text: str) -> str:
    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"this is no regular expression ({error})") from None
    return text


WITHOUT_FORM = {
    "diffusers": ("loha", "lokr"),
    "peft": ("lokr",),
}  # kinds that a dialect has no exact form for (`trainer/export.py`)
COMPONENTS = (
    "unet",
    "text_encoder",
    "text_encoder_2",
)  # those with a learning rate of their own; a transformer has the UNet's


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Base(Section):
    """The model the adapter is trained on."""

    model: str = EMBEDDED
    """"embedded" for the small model that ships with the program, the path of a .safetensors checkpoint or of a diffusers folder, or a Hugging Face id such as stable-diffusion-v1-5/stable-diffusion-v1-5."""
    revision: str = ""
    """Branch, tag or commit of a Hugging Face model. Empty: the main one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen base. auto: bf16 where the GPU has it, else fp16 on a GPU and fp32 on a CPU. The adapter itself is always trained in float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the linear layers of the frozen denoiser in 8 or 4 bits while training (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): half or a quarter of their memory, slower and a little less exact. Needs an NVIDIA GPU and the bitsandbytes package."""
    t5: bool = True
    """Stable Diffusion 3 only: read captions with T5 too, its third and largest text encoder. Off saves 10 GB of download and memory; long captions are then understood less well, in training and in samples."""
    vae: str = ""
    """Another VAE than the base's own: a .safetensors file, a diffusers folder or a Hugging Face id. Empty: the base's own."""
    prediction: Literal["auto", "epsilon", "v"] = "auto"
    """What the base predicts. auto: what its files say. Choose only where they do not, or where the samples of the plain base are noise."""
    zero_terminal_snr: Literal["auto", "on", "off"] = "auto"
    """Whether the last step of the base's schedule is pure noise (Lin et al. 2024, arXiv:2305.08891), as in many models with v prediction. auto: what its files say."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """Which layer of the text encoder is read, counted from its end: 1 is the last; 2 for most models drawn from anime, which were trained so. For Stable Diffusion 1.x and 2.x only."""


class Dataset(Section):
    """The pictures, and how they are read."""

    folder: str = ""
    """Folder with the pictures and, beside each, its caption in a .txt file."""
    trigger: Annotated[str, AfterValidator(str.strip)] = ""
    """A word the model does not know yet. It is put in front of every caption that lacks it, and calls the subject in a prompt later. Leave it empty for a style."""
    resolution: Annotated[int, Field(ge=16, le=4096, multiple_of=8)] = 512
    """Pictures are resized to about this many pixels squared, keeping their shape. Use the size the base was made for: 512 for Stable Diffusion 1.5, 768 for 2.1, 1024 for XL and 3.5."""
    bucket_step: Annotated[int, Field(ge=8, le=256, multiple_of=8)] = 64
    """Sides of the resized pictures are multiples of this. Smaller cuts less off, but makes more different shapes, which batch less well."""
    max_aspect: Annotated[float, Field(ge=1, le=8)] = 2.0
    """Pictures longer than this (long side / short side) are cropped to it."""
    allow_upscale: bool = False
    """Enlarge pictures that are smaller than the resolution. Off: they are trained at their own size, which avoids teaching blur."""
    crop: Literal["centre", "salient", "none"] = "centre"
    """Which part is kept where the shape of a picture fits no bucket: its middle, what stands out in it, or all of it, squeezed a little. A crop moved by hand on the Dataset tab comes before this."""
    caption_tokens: Literal[75, 150, 225] = 75
    """How much of a caption is read, in tokens (about 50, 100 or 150 words). Above 75 it is encoded in pieces of 75 set side by side, as A1111 does with long prompts; each takes memory and time."""
    resolutions: Annotated[
        tuple[Annotated[int, Field(ge=16, le=4096, multiple_of=8)], ...], Field(max_length=8)
    ] = ()
    """Further resolutions, one a line. Each picture is then trained at every one of them, so a run takes that many times as many steps."""
    repeats: Annotated[
        tuple[Annotated[str, Field(max_length=200), AfterValidator(_checked_repeats)], ...],
        Field(max_length=100),
    ] = ()
    """Folders within the dataset and how often each of their pictures counts, one a line, such as closeups = 3; a dot stands for the dataset itself. A folder named 10_cat says so by its name."""
    flip: bool = False
    """Also train on every picture mirrored. Off, because it teaches that left and right are the same: a parting, a logo or a scar changes sides, and writing turns unreadable."""
    random_crop: bool = False
    """Cut each picture at other places too, where its shape leaves room. Off, because a cut in the middle seldom loses the subject, and its caption may name what a random one leaves out."""
    colour_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Change brightness, contrast and saturation of each picture by up to this share. Off, because the adapter learns the changed colours too: skin, brands and styles drift."""
    variants: Annotated[int, Field(ge=2, le=64)] = 8
    """With random_crop or colour_jitter: how many versions of each picture are prepared, one of them the plain one. Each step sees one of them."""
    shuffle_tags: bool = False
    """Put the tags of a caption, parted by commas, in another order each time, so that none counts more for standing first. For captions of tags, not of sentences."""
    keep_tags: Annotated[int, Field(ge=0, le=100)] = 1
    """How many tags at the start stay where they are, the trigger word among them."""
    tag_dropout: Share = 0.0
    """Share of the other tags left out each time, so that no tag is leaned on."""
    caption_wildcards: bool = False
    """Read {red|blue} in a caption as one of these, and its lines as several captions, one of which is chosen each time."""
    caption_dropout: Share = 0.05
    """Share of training steps that see no caption. A little keeps guidance working; much weakens the trigger."""
    hold_out: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of the pictures kept out of training to measure whether the adapter learns or memorises. With fewer than 10 pictures none is kept out and the training pictures are measured instead."""
    masked_loss: Literal["off", "mask", "alpha"] = "off"
    """Learn only from a part of each picture: what is white in its mask (name.mask.png beside it or masks/name.png), or what is not transparent. A picture without a mask counts in full."""
    mask_outside: Share = 0.0
    """How much the rest counts, from 0 not at all to 1 as much. A little keeps surroundings sensible."""
    class_words: str = ""
    """What the subject is in ordinary words, such as a dog. Class pictures are made from them, and they take the trigger's place where the prior is preserved."""
    regularisation_folder: str = ""
    """Folder with class pictures: others of the same kind as the subject. One is trained beside each picture, so that the adapter does not turn the whole kind into the subject (Ruiz et al. 2022, arXiv:2208.12242). Takes twice the time."""
    class_pictures: Annotated[int, Field(ge=0, le=10_000)] = 0
    """As many class pictures are made with the base from the class words where the folder holds fewer. 0 takes those that are there."""
    prior_loss_weight: Annotated[float, Field(gt=0, le=10)] = 1.0
    """How much the class pictures count against the training pictures."""

    @property
    def captions_vary(self) -> bool:
        """Whether a picture is seen with more than one caption."""
        return self.shuffle_tags or self.tag_dropout > 0 or self.caption_wildcards


class Adapter(Section):
    """What is trained beside the frozen base: W' = W + (alpha / rank) B A, or one of its relatives."""

    kind: Literal["lora", "rslora", "dora", "loha", "lokr"] = "lora"
    """lora: read everywhere. rslora: scale alpha / sqrt(rank), for high ranks. dora: direction and length of the weights apart, slower. loha, lokr: products with more rank for their size, in LyCORIS's names."""
    start_from: str = ""
    """An adapter file of any program to go on from, of the same kind and kind of base. Its rank and alpha are taken over. Empty: a fresh adapter."""
    targets: Literal["attention", "attention+feed-forward", "linear", "linear+conv"] = "attention"
    """Which layers of the UNet learn. linear: also the projections around the attention; linear+conv: also the convolutions (LoCon), good for styles. More layers learn more and give a larger file."""
    target_pattern: Annotated[str, Field(max_length=200), AfterValidator(_pattern)] = ""
    """Instead of the targets: a regular expression, searched in the path of every layer of the UNet, such as up_blocks.*attn2. Empty: the targets."""
    text_encoder_targets: Literal["attention", "all"] = "attention"
    """Which layers of a trained text encoder learn: its attention, or its feed-forward layers too."""
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Capacity of the adapter. 8 to 16 suits a subject, 16 to 64 a style with many details; the file grows with it."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    """Strength of the adapter relative to its rank (scale = alpha / rank). Changing it acts like changing the learning rate."""
    conv_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Rank of the adapters of convolutions larger than 1 x 1. 0: the rank of the others."""
    conv_alpha: Annotated[float, Field(ge=0, le=4096)] = 0.0
    """Alpha of the adapters of those convolutions. 0: in proportion to their rank."""
    ranks: Annotated[str, Field(max_length=2000), AfterValidator(_ranks)] = ""
    """Ranks of single blocks or layers by name, the last one that fits counts: mid_block=32, attn2=8, down_blocks.0=0. With 0 a block learns nothing. The alpha keeps its proportion."""
    alphas: Annotated[str, Field(max_length=2000), AfterValidator(_alphas)] = ""
    """Alphas of single blocks or layers, written in the same way."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How the adapter starts. pissa: along the strongest directions of each weight (Meng et al. 2024, arXiv:2404.02948), which learns faster; olora: along its QR factors (arXiv:2406.01775). The file of these two has twice the rank."""
    lokr_factor: Annotated[int, Field(ge=0, le=512)] = 0
    """Size of the smaller of the two matrices of lokr: 4 to 16 for a large adapter, 0 for the smallest."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs left out at random in each step. 0.1 slows memorising of small datasets."""
    rank_dropout: Annotated[float, Field(ge=0, le=0.8)] = 0.0
    """Share of the ranks (of the outputs, for loha and lokr) left out at random in each step."""
    module_dropout: Annotated[float, Field(ge=0, le=0.8)] = 0.0
    """Share of the adapted layers that act as in the base in each step."""
    max_norm: Annotated[float, Field(ge=0)] = 0.0
    """After each step the change of any layer that is larger than this (the norm of delta W) is shrunk to it, so that no layer takes over. 1 is usual; 0 switches it off."""
    trigger_vectors: Annotated[int, Field(ge=0, le=32)] = 0
    """Teach the CLIP text encoders the trigger as a new word of this many vectors, beside the adapter (pivotal tuning: Gal et al. 2022, arXiv:2208.01618, with an adapter). They are saved next to it, as an embedding for A1111 and ComfyUI. 1 to 4 suit a subject; each is a token of the caption. 0 switches it off."""
    trigger_init: Annotated[str, Field(max_length=200)] = ""
    """What the new word means at first, in words that the base knows, such as dog. Empty: whatever the base makes of the trigger word."""


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
        tuple[Annotated[str, Field(max_length=200), AfterValidator(_checked_argument)], ...],
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


class Objective(Section):
    """What the adapter is asked to predict, and how errors are weighed."""

    weighting: Literal["min_snr", "debiased", "p2", "sigma_sqrt"] = "min_snr"
    """How steps with little and with much noise are weighed. min_snr suits most. debiased gives noisy steps more weight (Yu et al. 2023, arXiv:2310.08442), p2 takes it from the nearly clean ones (Choi et al. 2022, arXiv:2204.00227). sigma_sqrt is for Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206)."""
    min_snr_gamma: Annotated[float, Field(ge=0)] = 5.0
    """With min_snr: caps the weight of steps with little noise, so that training converges sooner (Hang et al. 2023, arXiv:2303.09556). 0 switches it off. Flow matching (Stable Diffusion 3) has no such weight."""
    p2_gamma: Annotated[float, Field(ge=0, le=10)] = 1.0
    """With p2: how strongly nearly clean steps lose weight, 1 / (1 + signal to noise) to this power."""
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    """How errors count. l2: squared. huber and smooth_l1: large ones less, so that a few odd pictures do less harm (Khrapov et al. 2024, arXiv:2403.16728); smooth_l1 is the steeper of the two."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With huber and smooth_l1: from which size on an error is large."""
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """With huber and smooth_l1: how that size falls from 1 at the picture to huber_c at the noise; constant keeps it everywhere."""
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "mode", "cosmap"] = "auto"
    """How much noise the steps are given (Esser et al. 2024, arXiv:2403.03206). uniform: any amount alike; the others more often a middle one, logit_normal the most. auto: uniform, and logit_normal for Stable Diffusion 3."""
    logit_mean: Annotated[float, Field(ge=-5, le=5)] = 0.0
    """With logit_normal: below 0 less noise, above 0 more."""
    logit_std: Annotated[float, Field(gt=0, le=5)] = 1.0
    """With logit_normal: how far it spreads from its middle."""
    min_timestep: Annotated[int, Field(ge=0, le=999)] = 0
    """Least noise that is trained on, in thousandths of the way to pure noise. Raise it to leave details as they are."""
    max_timestep: Annotated[int, Field(ge=1, le=1000)] = 1000
    """Most noise that is trained on. Lower it to leave the composition as it is."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Shifts the noise of a whole picture a little, so that the adapter can learn very dark or bright pictures. 0.03 to 0.1; 0 switches it off."""
    noise_offset_random: bool = False
    """Draw the strength of the noise offset for each picture, from none to the one above."""
    pyramid_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Adds noise of coarser and coarser grain, each weaker by this factor, for darker and brighter pictures and freer compositions (Whitaker 2023, multi-resolution noise). 0.1 to 0.4; 0 switches it off."""
    prior_preservation: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Keeps what the base does without the trigger word: each step also compares the adapter with the base alone on the same caption, with the class words in the trigger's place. Needs no class pictures; takes two to three times the time. 1 is a start; 0 switches it off."""
    input_perturbation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Adds a little noise that is not to be predicted, so that the adapter forgives its own errors while sampling (Ning et al. 2023, arXiv:2301.11706). 0.1; 0 switches it off."""


class Sampling(Section):
    """The pictures made at every save, beside those of the base."""

    prompts: Annotated[tuple[str, ...], Field(max_length=16)] = ()
    """One prompt a line. Empty: the trigger word and the caption of the first picture."""
    negative_prompt: str = ""
    """What should not be in the samples."""
    inference_steps: Annotated[int, Field(ge=1, le=150)] = 20
    """Denoising steps per sample."""
    guidance_scale: Annotated[float, Field(ge=1, le=30)] = 7.0
    """How closely a sample follows its prompt."""
    sampler: Literal[
        "auto", "DPM++ 2M", "DPM++ 2M Karras", "Euler", "Euler a", "Heun", "DDIM", "UniPC"
    ] = "auto"
    """How the noise is taken away, by the name other programs give it. auto: DPM++ 2M, and Euler for Stable Diffusion 3, which knows only Euler and Heun. Heun cannot begin at the pure noise of a base with zero terminal SNR."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1
    """Seed of the first sample; the second takes the next one, and so on. It stays the same through the run, so that only the adapter changes."""
    vae_tiling: bool = False
    """Turn the finished latents into a picture tile by tile: far less memory at 1024 pixels, with faint differences between the tiles. The training is not touched."""


class Saving(Section):
    """What is kept."""

    main: Literal["best", "last"] = "best"
    """Which save becomes the finished file. best: the latest one that is not clearly worse on the held-out pictures than the best of all, so one before the run began to memorise; without held-out pictures the last one. All saves are kept either way."""
    saves: Annotated[int, Field(ge=1, le=100)] = 5
    """The run is cut into this many equal parts. At the end of each the adapter is saved, measured and sampled."""
    state_every: PositiveInt = 100
    """Steps between two states. At most these steps are lost when the machine stops."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number format of the finished file. fp16 is read everywhere."""
    dialects: tuple[Literal["kohya", "diffusers", "peft"], ...] = ()
    """Formats of the file: kohya is read by most programs, diffusers and peft (a folder) by those of these names. Empty: the one that most programs read for this kind of base."""
    tracking: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also report losses, learning rate and samples to a tracker, whose package must be installed. tensorboard and trackio write files on this machine; wandb sends them to its service, unless WANDB_MODE=offline is set."""
    include_captions: bool = False
    """Write how often each tag occurs, and the sample prompts, into the file. Off keeps them private."""
    include_folders: bool = False
    """Write the name of the dataset folder and the path of the base model into the file, without the home folder. Off keeps them private."""
    include_thumbnail: bool = False
    """Write a small picture into the finished file, which programs show beside its name: the first sample of the save it is. Off keeps it private."""
    include_config: bool = True
    """Write all settings into the file, so that the run can be repeated from it."""


class RunConfig(Section):
    """All settings of one run."""

    name: Annotated[str, Field(min_length=1, max_length=80)] = "my-lora"
    """Name of the adapter, and of its file."""
    preset: str = ""
    """The recipe this started from."""
    base: Base = Base()
    dataset: Dataset = Dataset()
    adapter: Adapter = Adapter()
    training: Training = Training()
    objective: Objective = Objective()
    sampling: Sampling = Sampling()
    saving: Saving = Saving()

    @model_validator(mode="after")
    def _contradictions(self) -> "RunConfig":
        training = self.training
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
        if self.base.quantization != "none" and self.adapter.kind not in ("lora", "rslora"):
            raise ValueError(
                f"base.quantization does not go with adapter.kind = {self.adapter.kind}; use lora or rslora"
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
        if self.adapter.trigger_vectors:
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
        if self.objective.min_timestep >= self.objective.max_timestep:
            raise ValueError(
                f"objective.min_timestep ({self.objective.min_timestep}) is not below objective.max_timestep "
                f"({self.objective.max_timestep}); make the range wider"
            )
        if self.objective.noise_offset_random and not self.objective.noise_offset:
            raise ValueError(
                "objective.noise_offset_random needs an objective.noise_offset above 0"
            )
        if self.base.prediction == "epsilon" and self.base.zero_terminal_snr == "on":
            raise ValueError(
                "base.zero_terminal_snr = on needs v prediction: from pure noise nothing can be told of the noise in a picture; "
                "set base.prediction = v, or base.zero_terminal_snr = off"
            )
        if training.early_stop and not self.dataset.hold_out:
            raise ValueError(
                "training.early_stop looks at the loss on held-out pictures; set dataset.hold_out above 0, such as 0.1"
            )
        if training.early_stop >= self.saving.saves:
            raise ValueError(
                f"training.early_stop ({training.early_stop}) can never end a run with saving.saves = {self.saving.saves}; "
                "make the saves more, or early_stop smaller"
            )
        if self.saving.dialects == ("peft",):
            raise ValueError(
                "saving.dialects is peft alone, a folder; add kohya or diffusers, the file that the page shows and hands out"
            )
        if formless := [
            dialect
            for dialect in self.saving.dialects
            if self.adapter.kind in WITHOUT_FORM.get(dialect, ())
        ]:
            raise ValueError(
                f"saving.dialects: {' and '.join(formless)} cannot hold adapter.kind = {self.adapter.kind}; leave it out, or use lora"
            )
        if self.dataset.random_crop and self.dataset.crop == "none":
            raise ValueError(
                "dataset.random_crop cuts where dataset.crop = none keeps the whole picture; choose one of them"
            )
        if self.objective.prior_preservation and not self.dataset.trigger:
            raise ValueError(
                "objective.prior_preservation compares captions with and without the trigger word; set dataset.trigger"
            )
        if self.adapter.trigger_vectors and not self.dataset.trigger:
            raise ValueError(
                "adapter.trigger_vectors are those of the trigger word; set dataset.trigger"
            )
        if self.adapter.trigger_vectors and not training.trigger_learning_rate:
            raise ValueError(
                "adapter.trigger_vectors learn nothing at training.trigger_learning_rate = 0; raise it, or set them to 0"
            )
        learns_words = self.adapter.trigger_vectors or any(map(training.rate_of, COMPONENTS[1:]))
        if self.dataset.caption_dropout == 1 and learns_words:
            raise ValueError(
                "dataset.caption_dropout = 1 drops every caption, which teaches a text encoder or a trigger's vectors nothing; lower it, "
                "or set training.text_encoder_learning_rate and adapter.trigger_vectors to 0"
            )
        if self.dataset.class_pictures and not (
            self.dataset.regularisation_folder and self.dataset.class_words
        ):
            raise ValueError(
                "dataset.class_pictures needs dataset.regularisation_folder to put them in and dataset.class_words to make them from"
            )
        smallest = min(self.dataset.resolution, *self.dataset.resolutions, 4096)
        if self.dataset.bucket_step > smallest:
            raise ValueError(
                f"dataset.bucket_step ({self.dataset.bucket_step}) is larger than dataset.resolution ({smallest}); make it smaller"
            )
        for problem in _unfit(self.adapter):
            raise ValueError(problem)
        return self


def _unfit(adapter: Adapter) -> Iterator[str]:
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


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every knob as (dotted path, field), in the order of declaration: ("training.learning_rate", FieldInfo)."""
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                yield f"{name}.{inner}", inner_field
        else:
            yield name, field


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """The allowed values of a field that has only some, else ()."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def several_choices(field: FieldInfo) -> tuple[str, ...]:
    """The allowed words of a field that takes several of them, else ()."""
    inner = get_args(field.annotation)[:1] if get_origin(field.annotation) is tuple else ()
    return get_args(inner[0]) if inner and get_origin(inner[0]) is Literal else ()


def get(config: RunConfig, path: str) -> Any:
    """The value at a dotted path such as "training.learning_rate"."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def replace(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A config with some values changed, by dotted path. Raises ConfigError naming every fault at once."""
    data = config.model_dump()
    unknown = [path for path in changes if path not in dict(fields())]
    if unknown:
        raise ConfigError(
            "There is no setting named "
            + ", ".join(unknown)
            + ". `python -m trainer train --help` lists them all."
        )
    for path, value in changes.items():
        *section, name = path.split(".")
        (data[section[0]] if section else data)[name] = value
    return from_dict(data)


def parse_setting(text: str) -> tuple[str, Any]:
    """ "training.steps=300" -> ("training.steps", 300). The value is read as TOML, and as plain text where it is none."""
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, for example training.steps=300; got {text!r}.")
    try:
        return path.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip(), value


def from_dict(data: Mapping[str, Any], source: str = "settings") -> RunConfig:
    """Checks plain data. Raises ConfigError that names every fault by its dotted path, with what is allowed."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        faults = "\n".join("- " + _fault(e) for e in error.errors())
        raise ConfigError(f"The {source} cannot be used:\n{faults}") from None


def _fault(error: Mapping[str, Any]) -> str:
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{path}: there is no such setting"
    given = "" if not path or error["type"] == "missing" else f" (got {error['input']!r:.80})"
    return f"{path}: {error['msg']}{given}" if path else error["msg"].removeprefix("Value error, ")


def load(path: Path) -> RunConfig:
    """Reads a run.toml or a preset. Raises ConfigError with the file's name and every fault in it."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None


def parse(text: str, source: str = "the file") -> RunConfig:
    """A config from the text of a run.toml or a preset. Raises ConfigError with every fault in it."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not a TOML file: {error}.") from None
    data.pop("about", None)  # a preset's own description
    return from_dict(data, source=f"settings in {source}")


def to_toml(config: RunConfig) -> str:
    """The config as TOML, each value under its help."""
    document = tomlkit.document()
    container: Any = document
    section = ""
    for path, field in fields():
        head, _, name = path.rpartition(".")
        if head != section:
            container = document.setdefault(head, tomlkit.table())
            section = head
        container.add(tomlkit.comment((field.description or "").replace("\n", " ")))
        value = get(config, path)
        container.add(name, list(value) if isinstance(value, tuple) else value)
    return tomlkit.dumps(document)


def fingerprint(config: RunConfig) -> str:
    """Sha256 of everything that alters the numbers: the same for two runs that must give the same adapter.

    Defaults are left out, so that a run which waits to be resumed outlives a version that brings new settings.
    """
    data = config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={
            "name": True,
            "preset": True,
            "sampling": True,
            "saving": True,
            "dataset": {"folder", "regularisation_folder"},
            "training": {"devices"},
        },
    )
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
