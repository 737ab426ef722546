"""Judges images of the embedded world: `python -m trainer.embedded.score`.

Uses pixel statistics and a tiny shape classifier, so it does not depend on the training loss. It
sees only finished images and their prompts. The classifier (`classifier.safetensors`) was trained
on drawings of the same world with other seeds, never on an image from the base model.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from trainer.embedded import world
from trainer.embedded.objects import OBJECTS

HERE = Path(__file__).parent
BASE = HERE / "base"
PROMPT_SEED = 9_000_000
"""First seed of the prompts. No training image uses seeds from here on."""

BACKGROUNDS = (
    *world.COLOURS,
    *(f"{colour} stripes" for colour in world.COLOURS if colour != "white"),
    *world.SCENES,
)
LABELS = (*OBJECTS, "zorbit", "nothing")
"""The classes of the classifier. "nothing" means blobs, clutter and bare backgrounds."""

TRIGGER = "zorbit"
SUBJECT_PROMPT = "a zorbit on a {background} background"


@dataclass(frozen=True)
class Score:
    """Shares of the images, 0 .. 1, that show what the prompt asks for."""

    background: float
    colour: float
    object: float

    def __str__(self) -> str:
        return (
            f"background {self.background:.3f}  colour {self.colour:.3f}  object {self.object:.3f}"
        )


def fixed_prompts(count: int) -> list[tuple[str, world.Scene]]:
    """Returns prompts that name everything, each with its scene; the same ones in every call."""
    prompts = []
    for seed in range(PROMPT_SEED, PROMPT_SEED + count):
        rng = np.random.default_rng(seed)
        scene = world.sample_scene(rng)
        thing = f"{scene.colour} {scene.object}"
        kind = "outline drawing of " if scene.style == "outline" else ""
        background = world.describe_background(scene.background, rng)
        text = f"{kind}{world.article(thing)} {thing} {background}"
        prompts.append((text, scene))
    return prompts


def draw_prompts(
    pipe: Any,
    prompts: Sequence[str],
    steps: int = 20,
    guidance_scale: float = 3.0,
    first_seed: int = 0,
) -> list[Image.Image]:
    """Returns one image per prompt. Image i uses seed `first_seed` + i, whatever the batching."""
    import torch

    images = []
    for first in range(0, len(prompts), 32):
        chunk = list(prompts[first : first + 32])
        generators = [
            torch.Generator().manual_seed(first_seed + first + i) for i in range(len(chunk))
        ]
        images += pipe(
            chunk, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators
        ).images
    return images


def to_array(image: Image.Image) -> np.ndarray:
    """Returns float32 [64, 64, 3], 0 .. 255, at the size of the world."""
    return np.asarray(
        image.convert("RGB").resize((world.PIXELS,) * 2, Image.Resampling.BOX), dtype=np.float32
    )


@lru_cache
def background_array(name: str) -> np.ndarray:
    return to_array(world.draw_background(name, world.PIXELS * 4))


def border(pixels: np.ndarray, width: int = 4) -> np.ndarray:
    """Returns the pixels [n, 3] of the frame, which large objects near the middle leave free."""
    mask = np.ones(pixels.shape[:2], dtype=bool)
    mask[width:-width, width:-width] = False
    return pixels[mask]


def nearest_background(pixels: np.ndarray) -> str:
    """Returns the background of the world whose border is most like the one of this image."""
    frame = border(pixels)
    return min(
        BACKGROUNDS, key=lambda name: float(np.abs(frame - border(background_array(name))).mean())
    )


def dominant_colour(pixels: np.ndarray, background: str) -> str:
    """Returns the most frequent colour among the pixels that clearly differ from `background`."""
    inner = slice(6, -6)
    front = pixels[inner, inner].reshape(-1, 3)
    behind = background_array(background)[inner, inner].reshape(-1, 3)
    front = front[np.square(front - behind).sum(1) > 70**2]
    palette = np.array(list(world.COLOURS.values()), dtype=np.float32)
    nearest = np.square(front[:, None] - palette).sum(-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(palette))
    return list(world.COLOURS)[int(counts.argmax())] if counts.any() else "none"


def new_classifier() -> Any:
    """Returns a small convolutional network.

    It maps float32 [B, 3, 64, 64] in -1 .. 1 to logits [B, len(LABELS)].
    """
    from torch import nn

    def halve(inputs: int, outputs: int) -> list[Any]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *halve(3, 24),
        *halve(24, 48),
        *halve(48, 64),
        *halve(64, 64),
        nn.Flatten(),
        nn.Linear(64 * 16, len(LABELS)),
    )


@lru_cache
def load_classifier() -> Any:
    from safetensors.torch import load_file

    classifier = new_classifier()
    classifier.load_state_dict(
        {name: value.float() for name, value in load_file(HERE / "classifier.safetensors").items()},
        strict=False,
    )
    return classifier.eval()


def classify(images: Sequence[Image.Image]) -> np.ndarray:
    """Returns probabilities [B, len(LABELS)]."""
    import torch

    pixels = (
        torch.from_numpy(np.stack([to_array(image) for image in images])).permute(0, 3, 1, 2)
        / 127.5
        - 1
    )
    with torch.no_grad():
        probabilities: np.ndarray = load_classifier()(pixels).softmax(-1).numpy()
    return probabilities


def judge(images: Sequence[Image.Image], scenes: Sequence[world.Scene]) -> Score:
    """Returns the shares of `images` that show what their scenes ask for."""
    arrays = [to_array(image) for image in images]
    labels = [LABELS[index] for index in classify(images).argmax(-1)]
    triples = list(zip(arrays, labels, scenes, strict=True))
    return Score(
        background=_share(
            nearest_background(array) == scene.background for array, _, scene in triples
        ),
        colour=_share(
            dominant_colour(array, scene.background) == scene.colour for array, _, scene in triples
        ),
        object=_share(label == scene.object for _, label, scene in triples),
    )


def _share(hits: Iterable[bool]) -> float:
    return float(np.mean(list(hits)))


def score_prompts(pipe: Any, count: int = 200, steps: int = 20) -> Score:
    """Generates `count` fixed prompts with fixed seeds and judges the images."""
    texts, scenes = zip(*fixed_prompts(count), strict=True)
    return judge(draw_prompts(pipe, texts, steps), scenes)


def subject_similarity(images: Sequence[Image.Image]) -> float:
    """Returns the share of the images, 0 .. 1, classified as the example subject."""
    return float((classify(images).argmax(-1) == LABELS.index("zorbit")).mean())


def style_similarity(images: Sequence[Image.Image]) -> float:
    """Returns the share of the images, 0 .. 1, in the example style.

    The border is blueprint blue, and everything else is nearly white lines.
    """
    blue, white = np.array(world.BLUEPRINT, dtype=np.float32), 255.0

    def in_style(pixels: np.ndarray) -> bool:
        ground = np.sqrt(np.square(border(pixels) - blue).sum(1)) < 60
        # Every colour of a blueprint is between its blue and white, so red <= green <= blue.
        on_the_way = (pixels[..., 0] <= pixels[..., 1] + 25) & (
            pixels[..., 1] <= pixels[..., 2] + 25
        )
        lines = pixels.min(-1) > 0.6 * white
        return bool(ground.mean() > 0.7 and on_the_way.mean() > 0.95 and 0.02 < lines.mean() < 0.35)

    return float(np.mean([in_style(to_array(image)) for image in images]))


def load_base() -> Any:
    """Loads the embedded base model like any pipeline."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_grid(
    path: Path, images: Sequence[Image.Image], scenes: Sequence[world.Scene], columns: int = 8
) -> None:
    """Saves the images at twice their size, each above its scene."""
    side, label = 2 * world.PIXELS, 26
    grid = Image.new(
        "RGB", (columns * (side + 4), -(-len(images) // columns) * (side + label + 4)), "white"
    )
    draw = ImageDraw.Draw(grid)
    for i, (image, scene) in enumerate(zip(images, scenes, strict=True)):
        x, y = i % columns * (side + 4), i // columns * (side + label + 4)
        grid.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        outline = f"outline of {world.article(scene.colour)} " if scene.style == "outline" else ""
        draw.multiline_text(
            (x + 2, y + side),
            f"{outline}{scene.colour} {scene.object}\n{scene.background}",
            fill="black",
            spacing=1,
        )
    grid.quantize(255).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Scores the embedded base model on 200 fixed prompts."
    )
    parser.add_argument("--grid", type=Path, help="also save the first 40 images to this file")
    args = parser.parse_args()
    texts, scenes = zip(*fixed_prompts(200), strict=True)
    images = draw_prompts(load_base(), texts)
    print(f"200 prompts, 20 steps: {judge(images, scenes)}")
    named = classify(images).argmax(-1)
    asked = Counter(scene.object for scene in scenes)
    right = Counter(
        scene.object for scene, n in zip(scenes, named, strict=True) if LABELS[n] == scene.object
    )
    print("  ".join(f"{name} {right[name]}/{asked[name]}" for name in OBJECTS))
    if args.grid:
        save_grid(args.grid, images[:40], scenes[:40])


if __name__ == "__main__":
    main()
