"""The objects of the embedded world: outlines, a pen, and a drawing function per object.

Coordinates are in units of the object: x to the right, y down, from -1 to 1. Needs only Pillow and
NumPy.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

WHITE, BLACK, CREAM, LEAF = (250, 250, 250), (25, 25, 30), (245, 225, 190), (60, 150, 60)
ZORBIT_GREEN, ZORBIT_ORANGE = (120, 205, 50), (250, 120, 30)


def ellipse(x: float, y: float, rx: float, ry: float | None = None) -> Points:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [(x + rx * math.cos(a), y + (ry or rx) * math.sin(a)) for a in angles]


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def polar(radius: Callable[[float], float], n: int = 90) -> Points:
    """Returns the closed curve at distance `radius(angle)` from the origin; angle 0 points up."""
    angles = np.linspace(0, 2 * math.pi, n, endpoint=False)
    return [(radius(a) * math.sin(a), -radius(a) * math.cos(a)) for a in angles]


def heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return list(zip(x, y - 0.08, strict=True))


def moon() -> Points:
    """Returns a crescent: the unit circle minus a circle at its right."""
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
    """Returns four puffs on a flat base as one outline: the farthest puff in each direction."""
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


class Pen:
    """Draws the parts of one object on a transparent layer, filled (flat) or as lines (outline).

    A later part hides the lines below it in both styles, because a part overwrites alpha too.
    """

    def __init__(
        self,
        side: int,
        centre: tuple[float, float],
        radius: float,
        colour: Colour,
        lines_only: bool,
    ):
        self.layer = Image.new("RGBA", (side, side), (*colour, 0))
        self._draw = ImageDraw.Draw(self.layer)
        self._centre, self._radius = (centre[0] * side, centre[1] * side), radius * side
        self._line_width = max(1, round(0.15 * self._radius))
        self.colour, self.lines_only = colour, lines_only

    def part(self, points: Points, fill: Colour | None = None) -> None:
        """Draws a closed part. `fill` defaults to the object's colour."""
        xy = self._to_pixels(points)
        if self.lines_only:
            self._draw.polygon(xy, fill=(*self.colour, 0))
            self._stroke([*xy, *xy[:2]], self.colour)
        else:
            self._draw.polygon(xy, fill=(*(fill or self.colour), 255))

    def hole(self, points: Points) -> None:
        """Cuts a closed part out of the layer."""
        xy = self._to_pixels(points)
        self._draw.polygon(xy, fill=(*self.colour, 0))
        if self.lines_only:
            self._stroke([*xy, *xy[:2]], self.colour)

    def spot(self, points: Points, fill: Colour) -> None:
        """Draws a small detail that is filled in both styles, such as a pupil."""
        self._draw.polygon(
            self._to_pixels(points), fill=(*(self.colour if self.lines_only else fill), 255)
        )

    def line(self, points: Points, fill: Colour) -> None:
        """Draws an open line."""
        self._stroke(self._to_pixels(points), self.colour if self.lines_only else fill)

    def _to_pixels(self, points: Points) -> Points:
        (x0, y0), r = self._centre, self._radius
        return [(x0 + r * x, y0 + r * y) for x, y in points]

    def _stroke(self, xy: Points, colour: Colour) -> None:
        self._draw.line(xy, fill=(*colour, 255), width=self._line_width, joint="curve")


def darker(colour: Colour) -> Colour:
    red, green, blue = colour
    return round(0.55 * red), round(0.55 * green), round(0.55 * blue)


def contrast(colour: Colour) -> Colour:
    """Returns black or white, whichever is visible on `colour`."""
    return WHITE if sum(colour) < 300 else BLACK


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
    """Draws the example subject, which the base model does not know.

    A round green body, one huge eye, two antennae with orange balls.
    """
    for side in (-1, 1):
        pen.line([(side * 0.3, -0.3), (side * 0.58, -0.8)], ZORBIT_GREEN)
        pen.part(ellipse(side * 0.6, -0.8, 0.22), ZORBIT_ORANGE)
    pen.part(ellipse(0, 0.25, 0.78), ZORBIT_GREEN)
    pen.part(ellipse(0, 0.15, 0.45), WHITE)
    pen.spot(ellipse(0, 0.18, 0.22), BLACK)


def _single(outline: Points) -> Callable[[Pen], None]:
    """Returns a drawing function for an object with one part."""
    return lambda pen: pen.part(outline)


OBJECTS: dict[str, Callable[[Pen], None]] = {
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
"""The objects that the base model knows. The zorbit is not one of them."""
