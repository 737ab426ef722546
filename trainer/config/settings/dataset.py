"""The section [dataset] of the settings."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config import parsers
from trainer.config.settings.section import Section


class Dataset(Section):
    """The training images and captions, and how they are read."""

    folder: str = Field(default="", title="Dataset folder")
    """Folder with the images and, beside each image, its caption in a .txt file."""

    trigger: Annotated[str, AfterValidator(str.strip)] = Field(default="", title="Trigger word")
    """A word that the model does not know yet, and that calls the subject in a prompt later. It
    is added at the start of every caption that lacks it. Leave it empty for a style."""

    resolution: int = Field(default=512, title="Resolution", ge=16, le=4096, multiple_of=8)
    """Images are resized to about as many pixels as a square with this side, and keep their
    aspect ratio. Use the size of the base model: 512 for Stable Diffusion 1.5, 768 for 2.1, 1024
    for XL and 3.5."""

    bucket_step: int = Field(
        default=64, title="Bucket resolution steps", ge=8, le=256, multiple_of=8
    )
    """Width and height of the resized images are multiples of this. A smaller step crops less,
    but gives more different sizes, so fewer images fit into one batch."""

    max_aspect: float = Field(default=2.0, title="Max aspect ratio", ge=1, le=8)
    """Images with a higher aspect ratio (long side / short side) are cropped to this one."""

    allow_upscale: bool = Field(default=False, title="Upscale small images")
    """Enlarges images that are smaller than the resolution. Off: they are trained at their own
    size, so the adapter does not learn blur."""

    crop: Literal["centre", "salient", "none"] = Field(default="centre", title="Crop mode")
    """Which part of an image is kept if its aspect ratio fits no bucket. centre: the middle.
    salient: the most striking part. none: the whole image, slightly squeezed. A crop set by
    hand on the Dataset tab overrides this."""

    caption_tokens: Literal[75, 150, 225] = Field(default=75, title="Max token length")
    """How many tokens of a caption are used (about 50, 100 or 150 words). Above 75, a caption is
    encoded in chunks of 75 tokens, as A1111 does with long prompts. Each chunk needs memory and
    time."""

    resolutions: tuple[Annotated[int, Field(ge=16, le=4096, multiple_of=8)], ...] = Field(
        default=(), title="Additional resolutions", max_length=8
    )
    """More resolutions, one per line. Each image is then trained at every resolution, so a run
    takes that many times as many steps."""

    repeats: tuple[
        Annotated[str, Field(max_length=200), AfterValidator(parsers.checked_repeats)], ...
    ] = Field(default=(), title="Repeats per folder", max_length=100)
    """Subfolders of the dataset and how often each of their images counts, one per line, such as
    closeups = 3. A dot is the dataset folder itself. The name of a folder such as 10_cat sets its
    repeats too."""

    flip: bool = Field(default=False, title="Flip augmentation")
    """Also trains on a mirrored copy of every image. Off by default, because it teaches that left
    and right are the same: a parting, a logo or a scar changes sides, and text becomes
    unreadable."""

    random_crop: bool = Field(default=False, title="Random crop")
    """Crops each image at other positions too, if its aspect ratio leaves room. Off by default,
    because a centre crop rarely loses the subject, and a random crop may cut off what the caption
    names."""

    colour_jitter: float = Field(default=0.0, title="Colour augmentation", ge=0, le=0.5)
    """Changes brightness, contrast and saturation of each image by up to this fraction. Off by
    default, because the adapter learns the changed colours too: skin, brands and styles drift."""

    variants: int = Field(default=8, title="Augmented variants per image", ge=2, le=64)
    """With random crop or colour augmentation: how many variants of each image are prepared. One
    of them is the plain image. Each step uses one variant."""

    shuffle_tags: bool = Field(default=False, title="Shuffle caption tags")
    """Shuffles the tags of a caption, which are separated by commas, at each step, so that no tag
    counts more because it comes first. For captions of tags, not of sentences."""

    keep_tags: int = Field(default=1, title="Keep first tags", ge=0, le=100)
    """How many tags at the start are never shuffled or dropped, including the trigger word."""

    tag_dropout: float = Field(default=0.0, title="Tag dropout rate", ge=0, le=1)
    """Fraction of the remaining tags dropped at each step, so that the model does not rely on any
    one of them."""

    caption_wildcards: bool = Field(default=False, title="Wildcards in captions")
    """Replaces {red|blue} in a caption by one of the words, and treats each line as a caption of
    its image. Each step chooses at random."""

    caption_dropout: float = Field(default=0.05, title="Caption dropout rate", ge=0, le=1)
    """Fraction of training steps without a caption. A little keeps classifier-free guidance
    working; a lot weakens the trigger word."""

    hold_out: float = Field(default=0.1, title="Validation split", ge=0, le=0.5)
    """Fraction of the images that is not trained on. Their loss shows whether the adapter learns
    or memorises. With fewer than 10 images, all are trained on, and the loss is measured on the
    training images."""

    masked_loss: Literal["off", "mask", "alpha"] = Field(default="off", title="Masked training")
    """Trains on a part of each image only. mask: the white part of name.mask.png beside the
    image, or of masks/name.png. alpha: the opaque part of the image. Images without a mask count
    in full."""

    mask_outside: float = Field(default=0.0, title="Unmasked weight", ge=0, le=1)
    """How much the part outside the mask counts, from 0 (not at all) to 1 (fully). A small value
    keeps the surroundings plausible."""

    class_words: str = Field(default="", title="Class prompt")
    """The subject in ordinary words, such as a dog. Class images are generated from this prompt,
    and prior preservation uses it in place of the trigger word."""

    regularisation_folder: str = Field(default="", title="Regularisation images folder")
    """Folder with class images: other subjects of the same class. One of them is trained beside
    each training image, so that the adapter does not turn the whole class into the subject (Ruiz
    et al. 2022, arXiv:2208.12242). Training takes twice as long."""

    class_pictures: int = Field(default=0, title="Number of class images", ge=0, le=10_000)
    """If the folder contains fewer class images than this, the base model generates the missing
    ones from the class prompt. 0: only the images in the folder are used."""

    prior_loss_weight: float = Field(default=1.0, title="Prior loss weight", gt=0, le=10)
    """How much the class images count, relative to the training images."""

    @property
    def captions_vary(self) -> bool:
        """Whether an image is seen with more than one caption."""
        return self.shuffle_tags or self.tag_dropout > 0 or self.caption_wildcards
