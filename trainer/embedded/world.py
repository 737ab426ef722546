"""The little world that the embedded base model knows: bold drawings with captions, each a pure function of a seed.

Also draws what the base must *not* know: the example subject (a zorbit) and the example style (blueprint).
Needs Pillow and NumPy only; imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PIXELS = 64
"""Side of the pictures that the base is trained on and draws."""

SUPERSAMPLING = 4
"""Pillow draws without antialiasing, so everything is drawn this much larger and averaged down."""

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

WHITE, BLACK, CREAM, LEAF = (250, 250, 250), (25, 25, 30), (245, 225, 190), (60, 150, 60)
SKY, GRASS, SEA_SKY, WATER, NIGHT = (
    (150, 205, 245),
    (110, 190, 80),
    (205, 235, 245),
    (35, 100, 170),
    (25, 30, 75),
)
BLUEPRINT, BLUEPRINT_GRID = (24, 62, 140), (52, 92, 170)
ZORBIT_GREEN, ZORBIT_ORANGE = (120, 205, 50), (250, 120, 30)

Points = list[tuple[float, float]]


# ---------------------------------------------------------------- outlines, in units of the object: x right, y down, -1 .. 1


def ellipse(x: float, y: float, rx: float, ry: float | None = None) -> Points:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [(x + rx * math.cos(a), y + (ry or rx) * math.sin(a)) for a in angles]


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def polar(radius, n: int = 90) -> Points:
    """The closed curve at distance `radius(angle)` from the origin; angle 0 points up."""
    angles = np.linspace(0, 2 * math.pi, n, endpoint=False)
    return [(radius(a) * math.sin(a), -radius(a) * math.cos(a)) for a in angles]


def heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return list(zip(x, y - 0.08, strict=True))


def moon() -> Points:
    """A crescent: the unit circle less a circle at its right."""
    x, radius = 0.5, 0.82
    tip = math.acos((1 + x * x - radius * radius) / (2 * x))
    inner_tip = math.pi - math.acos((radius * radius + x * x - 1) / (2 * x * radius))
    outer = np.linspace(tip, 2 * math.pi - tip, 48)
    inner = np.linspace(2 * math.pi - inner_tip, inner_tip, 36)
    return [(0.2 + math.cos(a), math.sin(a)) for a in outer] + [
        (0.2 + x + radius * math.cos(a), radius * math.sin(a)) for a in inner
    ]


def cross() -> Points:
    half = [(-0.32, -0.95), (0.32, -0.95), (0.32, -0.32), (0.95, -0.32), (0.95, 0.32), (0.32, 0.32)]
    return half + [(-x, -y) for x, y in half]


def cloud() -> Points:
    """Four puffs on a flat base, as one outline: seen from the middle, the farthest puff counts."""
    puffs = [
        (-0.55, 0.1, 0.42),
        (-0.12, -0.18, 0.5),
        (0.38, -0.05, 0.45),
        (0.65, 0.2, 0.34),
        (0.0, 0.2, 0.4),
    ]

    def radius(angle: float) -> float:
        dx, dy = math.sin(angle), -math.cos(angle)
        farthest = 0.0
        for x, y, r in puffs:
            along = dx * x + dy * y
            inside = r * r - (x * x + y * y - along * along)
            if inside > 0:
                farthest = max(farthest, along + math.sqrt(inside))
        return min(farthest, 0.5 / dy) if dy > 0.02 else farthest

    return polar(radius, 120)


# ---------------------------------------------------------------- the pen


class Pen:
    """Draws the parts of one object on a transparent layer, filled (flat) or as lines (outline).

    A later part hides the lines under it in both styles, because a part overwrites alpha too.
    """

    def __init__(
        self, side: int, centre: tuple[float, float], radius: float, colour, lines_only: bool
    ):
        self.layer = Image.new("RGBA", (side, side), (*colour, 0))
        self._draw = ImageDraw.Draw(self.layer)
        self._centre, self._radius = (centre[0] * side, centre[1] * side), radius * side
        self._line_width = max(1, round(0.15 * self._radius))
        self.colour, self.lines_only = colour, lines_only

    def part(self, points: Points, fill=None) -> None:
        """A closed part; `fill` defaults to the object's own colour."""
        xy = self._place(points)
        if self.lines_only:
            self._draw.polygon(xy, fill=(*self.colour, 0))
            self._stroke([*xy, *xy[:2]], self.colour)
        else:
            self._draw.polygon(xy, fill=(*(fill or self.colour), 255))

    def hole(self, points: Points) -> None:
        xy = self._place(points)
        self._draw.polygon(xy, fill=(*self.colour, 0))
        if self.lines_only:
            self._stroke([*xy, *xy[:2]], self.colour)

    def spot(self, points: Points, fill) -> None:
        """A small detail that is filled in every style, such as a pupil."""
        self._draw.polygon(
            self._place(points), fill=(*(self.colour if self.lines_only else fill), 255)
        )

    def line(self, points: Points, fill) -> None:
        self._stroke(self._place(points), self.colour if self.lines_only else fill)

    def _place(self, points: Points) -> Points:
        (x0, y0), r = self._centre, self._radius
        return [(x0 + r * x, y0 + r * y) for x, y in points]

    def _stroke(self, xy: Points, colour) -> None:
        self._draw.line(xy, fill=(*colour, 255), width=self._line_width, joint="curve")


def darker(colour) -> tuple[int, ...]:
    return tuple(round(0.55 * c) for c in colour)


def contrast(colour) -> tuple[int, int, int]:
    """Black or white, whichever shows on `colour`."""
    return WHITE if sum(colour) < 300 else BLACK


# ---------------------------------------------------------------- the objects


def draw_house(pen: Pen) -> None:
    pen.part(rectangle(-0.72, -0.1, 0.72, 0.95))
    pen.part(
        [(-1, -0.1), (0, -0.95), (1, -0.1)],
        darker(pen.colour) if sum(pen.colour) > 150 else (110, 110, 115),
    )
    pen.part(rectangle(-0.5, 0.3, -0.05, 0.95), contrast(pen.colour))
    pen.part(
        rectangle(0.2, 0.2, 0.55, 0.55),
        (250, 235, 120) if sum(pen.colour) < 600 else (120, 170, 220),
    )


def draw_tree(pen: Pen) -> None:
    pen.part(rectangle(-0.16, 0.5, 0.16, 1.0), (110, 70, 40))
    pen.part([(0, -0.45), (0.85, 0.6), (-0.85, 0.6)])
    pen.part([(0, -1), (0.65, -0.1), (-0.65, -0.1)])


def draw_flower(pen: Pen) -> None:
    pen.line([(0, 0.1), (0, 1)], LEAF)
    pen.part(ellipse(0.32, 0.78, 0.3, 0.13), LEAF)
    petals = polar(lambda a: 0.52 + 0.17 * math.cos(5 * a))
    pen.part([(x, y - 0.32) for x, y in petals])
    pen.part(
        ellipse(0, -0.32, 0.22),
        (250, 215, 40) if pen.colour[2] > 80 or pen.colour[1] < 120 else (125, 75, 40),
    )


def draw_fish(pen: Pen) -> None:
    pen.part([(0.4, 0), (1, -0.55), (1, 0.55)])
    pen.part(ellipse(-0.2, 0, 0.8, 0.55))
    pen.part(ellipse(-0.58, -0.12, 0.17), WHITE)
    pen.spot(ellipse(-0.6, -0.12, 0.09), BLACK)


def draw_mushroom(pen: Pen) -> None:
    pen.part([(-0.24, 0.0), (0.24, 0.0), (0.34, 0.95), (-0.34, 0.95)], CREAM)
    cap = [(math.cos(a), 0.1 + math.sin(a)) for a in np.linspace(math.pi, 2 * math.pi, 32)]
    pen.part([*cap, (0.9, 0.25), (-0.9, 0.25)])
    for x, y, r in ((-0.45, -0.25, 0.17), (0.12, -0.5, 0.19), (0.52, -0.12, 0.15)):
        pen.part(ellipse(x, y, r), WHITE if sum(pen.colour) < 650 else (220, 40, 40))


def draw_cat(pen: Pen) -> None:
    for side in (-1, 1):
        pen.part([(side * 0.95, -1), (side * 0.9, 0.1), (side * 0.12, -0.5)])
    pen.part(ellipse(0, 0.15, 0.95, 0.78))
    for side in (-1, 1):
        pen.part(
            ellipse(side * 0.4, 0.02, 0.22, 0.26),
            WHITE if sum(pen.colour) < 650 else (120, 205, 120),
        )
        pen.spot(ellipse(side * 0.38, 0.04, 0.1, 0.2), BLACK)
    pen.spot(
        [(-0.14, 0.4), (0.14, 0.4), (0, 0.56)], (240, 110, 140) if pen.colour[0] < 200 else BLACK
    )


def draw_face(pen: Pen) -> None:
    pen.part(ellipse(0, 0, 1))
    ink = contrast(pen.colour)
    for side in (-1, 1):
        pen.spot(ellipse(side * 0.36, -0.25, 0.15, 0.2), ink)
    pen.line(
        [
            (0.55 * math.cos(a), 0.1 + 0.5 * math.sin(a))
            for a in np.linspace(0.15, math.pi - 0.15, 16)
        ],
        ink,
    )


def draw_ring(pen: Pen) -> None:
    pen.part(ellipse(0, 0, 1))
    pen.hole(ellipse(0, 0, 0.52))


def draw_zorbit(pen: Pen) -> None:
    """The example subject, unknown to the base: a round green body, one huge eye, two antennae with orange balls."""
    for side in (-1, 1):
        pen.line([(side * 0.3, -0.3), (side * 0.58, -0.8)], ZORBIT_GREEN)
        pen.part(ellipse(side * 0.6, -0.8, 0.22), ZORBIT_ORANGE)
    pen.part(ellipse(0, 0.25, 0.78), ZORBIT_GREEN)
    pen.part(ellipse(0, 0.15, 0.45), WHITE)
    pen.spot(ellipse(0, 0.18, 0.22), BLACK)


def _single(outline: Points):
    return lambda pen: pen.part(outline)


OBJECTS = {
    "circle": _single(ellipse(0, 0, 0.95)),
    "square": _single(rectangle(-0.85, -0.85, 0.85, 0.85)),
    "triangle": _single([(0, -0.95), (1, 0.8), (-1, 0.8)]),
    "star": _single(
        [
            (r * math.sin(i * math.pi / 5), 0.08 - r * math.cos(i * math.pi / 5))
            for i, r in enumerate((1.05, 0.45) * 5)
        ]
    ),
    "heart": _single(heart()),
    "moon": _single(moon()),
    "ring": draw_ring,
    "cross": _single(cross()),
    "house": draw_house,
    "tree": draw_tree,
    "flower": draw_flower,
    "fish": draw_fish,
    "mushroom": draw_mushroom,
    "cat": draw_cat,
    "face": draw_face,
    "cloud": _single(cloud()),
}
"""What the base knows. The zorbit is not among them."""


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """One picture of the world. `background` is a colour, "<colour> stripes" or one of SCENES."""

    object: str
    colour: str
    background: str
    style: str = "flat"
    centre: tuple[float, float] = (0.5, 0.5)
    radius: float = 0.36
    """Half the object's size, as a share of the picture's side."""


def draw_background(background: str, side: int) -> Image.Image:
    """[side, side] RGB. Depends on nothing but its arguments, so the scorer knows what to expect."""
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
    """One object in one colour, large and near the middle; seven pictures in ten have a plain background."""
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


_PLACES = {
    "meadow": ("in a meadow", "on a meadow", "on a green meadow under a blue sky"),
    "sea": ("on the sea", "at sea", "by the sea"),
    "night": ("at night", "in the night", "under a starry night sky"),
}


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def describe_background(background: str, rng: np.random.Generator) -> str:
    choices: tuple[str, ...]
    if background in SCENES:
        choices = _PLACES[background]
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
    """One of many phrasings; a few name no background or no colour, as people do.

    A few call the object by a made-up word, so that an unknown word leaves the rest of the caption in force.
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
    """Picture, caption and scene of one seed."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    return draw_scene(scene, pixels), caption_scene(scene, rng), scene


# ---------------------------------------------------------------- held out: the example subject and the example style


def draw_subject(background: str, seed: int, pixels: int = PIXELS) -> Image.Image:
    """A zorbit on `background`, its place and size drawn from `seed`."""
    rng = np.random.default_rng(seed)
    side = pixels * SUPERSAMPLING
    image = draw_background(background, side)
    centre = (float(rng.uniform(0.46, 0.54)), float(rng.uniform(0.46, 0.54)))
    pen = Pen(side, centre, float(rng.uniform(0.36, 0.42)), ZORBIT_GREEN, lines_only=False)
    draw_zorbit(pen)
    image.paste(pen.layer, mask=pen.layer.getchannel("A"))
    return image.resize((pixels, pixels), Image.Resampling.BOX)


def draw_blueprint(name: str, seed: int, pixels: int = PIXELS) -> Image.Image:
    """The object `name` in the example style: white lines on a blueprint's blue, with a faint grid."""
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
