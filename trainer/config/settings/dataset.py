"""The section [dataset]."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config import parsers
from trainer.config.settings.section import Section, Share


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
        tuple[Annotated[str, Field(max_length=200), AfterValidator(parsers.checked_repeats)], ...],
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
