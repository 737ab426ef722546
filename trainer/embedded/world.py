"""The small world of the embedded base model: bold drawings with captions, from a seed.

Also draws what the base model must *not* know: the example subject (a zorbit) and the example
style (blueprint). Needs only Pillow and NumPy, and never loads torch.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from trainer.embedded.objects import OBJECTS, WHITE, ZORBIT_GREEN, Pen, draw_zorbit

PIXELS = 64
"""Side of the images that the base model is trained on and generates."""

SUPERSAMPLING = 4
"""Pillow draws without antialiasing, so everything is drawn this much larger and scaled down."""

COLOURS = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 215, 40),
    "green": (50, 160, 70),
    "blue": (40, 90, 220),
    "purple": (130, 60, 180),
    "pink": (250, 140, 190),
    "brown": (125, 75, 40),
    "black": (25, 25, 30),
    "white": (250, 250, 250),
}
SCENES = ("meadow", "sea", "night")
STYLES = ("flat", "outline")

SKY, GRASS, SEA_SKY, WATER, NIGHT = (
    (150, 205, 245),
    (110, 190, 80),
    (205, 235, 245),
    (35, 100, 170),
    (25, 30, 75),
)
BLUEPRINT, BLUEPRINT_GRID = (24, 62, 140), (52, 92, 170)


@dataclass(frozen=True)
class Scene:
    """One image of the world. `background` is a colour, "<colour> stripes" or one of SCENES."""

    object: str
    colour: str
    background: str
    style: str = "flat"
    centre: tuple[float, float] = (0.5, 0.5)
    radius: float = 0.36
    """Half the object's size, as a share of the image's side."""


def draw_background(background: str, side: int) -> Image.Image:
    """Returns [side, side] RGB, from the arguments alone: the scorer compares with it."""
    image = Image.new("RGB", (side, side), COLOURS.get(background, WHITE))
    draw = ImageDraw.Draw(image)
    if background.endswith(" stripes"):
        for i in range(0, 6, 2):
            draw.rectangle(
                (i * side / 6, 0, (i + 1) * side / 6 - 1, side),
                fill=COLOURS[background.removesuffix(" stripes")],
            )
    elif background == "meadow":
        draw.rectangle((0, 0, side, side), fill=SKY)
        draw.rectangle((0, 0.62 * side, side, side), fill=GRASS)
    elif background == "sea":
        draw.rectangle((0, 0, side, side), fill=SEA_SKY)
        draw.rectangle((0, 0.5 * side, side, side), fill=WATER)
    elif background == "night":
        draw.rectangle((0, 0, side, side), fill=NIGHT)
        for x, y in (
            (0.1, 0.12),
            (0.32, 0.06),
            (0.88, 0.15),
            (0.93, 0.55),
            (0.06, 0.6),
            (0.7, 0.07),
            (0.14, 0.9),
            (0.85, 0.9),
        ):
            draw.ellipse(
                (side * (x - 0.02), side * (y - 0.02), side * (x + 0.02), side * (y + 0.02)),
                fill=(250, 240, 180),
            )
    return image


def draw_scene(scene: Scene, pixels: int = PIXELS) -> Image.Image:
    side = pixels * SUPERSAMPLING
    image = draw_background(scene.background, side)
    pen = Pen(
        side, scene.centre, scene.radius, COLOURS[scene.colour], lines_only=scene.style == "outline"
    )
    OBJECTS[scene.object](pen)
    image.paste(pen.layer, mask=pen.layer.getchannel("A"))
    return image.resize((pixels, pixels), Image.Resampling.BOX)


_CLASHES = {"meadow": ("green",), "sea": ("blue",), "night": ("black", "blue")}


def sample_scene(rng: np.random.Generator) -> Scene:
    """Returns one object in one colour, large and near the middle. 72 % have a plain background."""
    kind = rng.random()
    if kind < 0.72:
        background = "white" if rng.random() < 0.2 else str(rng.choice(list(COLOURS)))
        clash: tuple[str, ...] = (background,)
    elif kind < 0.82:
        stripe = str(rng.choice([c for c in COLOURS if c != "white"]))
        background, clash = f"{stripe} stripes", (stripe, "white")
    else:
        background = str(rng.choice(SCENES))
        clash = _CLASHES[background]
    return Scene(
        object=str(rng.choice(list(OBJECTS))),
        colour=str(rng.choice([c for c in COLOURS if c not in clash])),
        background=background,
        style="outline" if rng.random() < 0.22 else "flat",
        centre=(float(rng.uniform(0.45, 0.55)), float(rng.uniform(0.45, 0.55))),
        radius=float(rng.uniform(0.3, 0.4)),
    )


_PHRASES = {
    "meadow": ("in a meadow", "on a meadow", "on a green meadow under a blue sky"),
    "sea": ("on the sea", "at sea", "by the sea"),
    "night": ("at night", "in the night", "under a starry night sky"),
}


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def describe_background(background: str, rng: np.random.Generator) -> str:
    choices: tuple[str, ...]
    if background in SCENES:
        choices = _PHRASES[background]
    elif background.endswith(" stripes"):
        stripe = background.removesuffix(" stripes")
        choices = (
            f"on {stripe} stripes",
            f"on {stripe} and white stripes",
            f"on a {stripe} striped background",
        )
    else:
        ground = f"{article(background)} {background} background"
        choices = (f"on {ground}",) * 3 + (
            f"on {background}",
            f"with {ground}",
            f"in front of {ground}",
        )
    return str(rng.choice(choices))


def made_up_word(rng: np.random.Generator) -> str:
    syllables = rng.integers(2, 4)
    return "".join(
        str(rng.choice(list("bcdfgklmnprstvz"))) + str(rng.choice(list("aeiou")))
        for _ in range(syllables)
    )


def caption_scene(scene: Scene, rng: np.random.Generator) -> str:
    """Returns one of many phrasings. A few omit the background or the colour, as people do.

    A few use a made-up word for the object, so that an unknown word does not disable the rest of a
    caption.
    """
    colour = "" if rng.random() < 0.04 else f"{scene.colour} "
    name = made_up_word(rng) if rng.random() < 0.04 else scene.object
    thing = f"{colour}{name}"
    a_thing = f"{article(thing)} {thing}"
    forms: tuple[str, ...]
    if scene.style == "outline":
        forms = (
            f"outline drawing of {a_thing}",
            f"an outline drawing of {a_thing}",
            f"outline of {a_thing}",
            f"line art of {a_thing}",
        )
    else:
        forms = (a_thing,) * 6 + (
            thing,
            f"a drawing of {a_thing}",
            f"a picture of {a_thing}",
            f"a big {thing}",
        )
    text = str(rng.choice(forms))
    if rng.random() > 0.12:
        separator = ", " if rng.random() < 0.15 else " "
        text += separator + describe_background(scene.background, rng)
    return text


def draw_example(seed: int, pixels: int = PIXELS) -> tuple[Image.Image, str, Scene]:
    """Returns image, caption and scene of one seed."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    return draw_scene(scene, pixels), caption_scene(scene, rng), scene


def draw_subject(background: str, seed: int, pixels: int = PIXELS) -> Image.Image:
    """Returns a zorbit on `background`, with position and size drawn from `seed`."""
    rng = np.random.default_rng(seed)
    side = pixels * SUPERSAMPLING
    image = draw_background(background, side)
    centre = (float(rng.uniform(0.46, 0.54)), float(rng.uniform(0.46, 0.54)))
    pen = Pen(side, centre, float(rng.uniform(0.36, 0.42)), ZORBIT_GREEN, lines_only=False)
    draw_zorbit(pen)
    image.paste(pen.layer, mask=pen.layer.getchannel("A"))
    return image.resize((pixels, pixels), Image.Resampling.BOX)


def draw_blueprint(name: str, seed: int, pixels: int = PIXELS) -> Image.Image:
    """Returns an object in the example style: white lines on blueprint blue, with a faint grid."""
    rng = np.random.default_rng(seed)
    side = pixels * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BLUEPRINT)
    draw = ImageDraw.Draw(image)
    for i in range(1, 8):
        for line in ((i * side / 8, 0, i * side / 8, side), (0, i * side / 8, side, i * side / 8)):
            draw.line(line, fill=BLUEPRINT_GRID, width=max(1, side // 128))
    centre = (float(rng.uniform(0.46, 0.54)), float(rng.uniform(0.46, 0.54)))
    pen = Pen(side, centre, float(rng.uniform(0.34, 0.4)), WHITE, lines_only=True)
    OBJECTS[name](pen)
    image.paste(pen.layer, mask=pen.layer.getchannel("A"))
    return image.resize((pixels, pixels), Image.Resampling.BOX)
