"""Makes the embedded base model from nothing.

    vae        images -> 8x8x4 latents and back                 -> base/vae
    text       tokenizer, then the text encoder on captions     -> base/tokenizer, base/text_encoder
    unet       the denoiser, on precomputed latents             -> base/unet, base/scheduler,
                                                                   base/model_index.json
    classifier the scorer's classifier of shapes                -> classifier.safetensors
    examples   the drawn example datasets                       -> examples/subject, examples/style

`python -m scripts.embedded_base.train` runs every stage in order, and with a name only that stage.
Stages save checkpoints in the work folder and continue from them. The result has the layout of
Stable Diffusion 1.5, only smaller.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.embedded_base.classifier import train_classifier
from scripts.embedded_base.text import train_text
from scripts.embedded_base.unet import export_unet, train_unet
from scripts.embedded_base.vae import train_vae
from trainer.embedded import world
from trainer.embedded.score import HERE

EXAMPLE_PIXELS = 256
SUBJECT_BACKGROUNDS = (
    "white",
    "blue",
    "pink",
    "yellow",
    "purple",
    "black",
    "orange",
    "red",
    "white",
    "blue",
    "brown",
    "pink",
)
STYLE_OBJECTS = (
    "circle",
    "star",
    "heart",
    "moon",
    "ring",
    "house",
    "tree",
    "flower",
    "fish",
    "mushroom",
    "cat",
    "face",
)


def make_examples() -> None:
    """Writes the drawn datasets. They are larger than the base draws, for the gallery."""
    for name in ("subject", "style"):
        (HERE / "examples" / name).mkdir(parents=True, exist_ok=True)
    for i, background in enumerate(SUBJECT_BACKGROUNDS):
        path = HERE / "examples/subject" / f"zorbit-{i + 1:02d}.png"
        world.draw_subject(background, seed=i, pixels=EXAMPLE_PIXELS).save(path, optimize=True)
        ground = f"{world.article(background)} {background} background"
        path.with_suffix(".txt").write_text(f"a zorbit on {ground}\n")
    for i, thing in enumerate(STYLE_OBJECTS):
        path = HERE / "examples/style" / f"blueprint-{i + 1:02d}-{thing}.png"
        world.draw_blueprint(thing, seed=i, pixels=EXAMPLE_PIXELS).save(path, optimize=True)
        path.with_suffix(".txt").write_text(f"a {thing}, blueprint\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("outputs/base"),
        help="checkpoints and caches; may be deleted afterwards",
    )
    parser.add_argument("--minutes", type=float, default=80, help="how long the UNet trains")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "vae": lambda: train_vae(args.work, 1450),
        "text": lambda: train_text(800),
        "unet": lambda: train_unet(args.work, args.minutes),
        "classifier": train_classifier,
        "examples": make_examples,
        "export": lambda: export_unet(args.work),
    }
    for stage in args.stages or stages:
        stages[stage]()


if __name__ == "__main__":
    main()
