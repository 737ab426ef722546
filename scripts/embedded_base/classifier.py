"""The classifier of shapes that the scorer uses, trained on drawings only."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from scripts.embedded_base.common import SEED, cosine, draw_confetti, to_pixels
from trainer.embedded import objects, score, world


def blob(rng: np.random.Generator) -> Image.Image:
    """Draws a wobbly shape that is no known object, as an undertrained base does."""
    names = list(world.COLOURS)
    colour, background = rng.choice(names, 2, replace=False)
    waves = rng.normal(0, 0.12, (2, 5))

    def radius(angle: float) -> float:
        return 0.75 + sum(
            waves[0, k] * math.cos((k + 1) * angle) + waves[1, k] * math.sin((k + 1) * angle)
            for k in range(5)
        )

    side = world.PIXELS * 2
    image = world.draw_background(str(background), side)
    centre = tuple(rng.uniform(0.4, 0.6, 2))
    pen = objects.Pen(
        side,
        centre,
        rng.uniform(0.25, 0.4),
        world.COLOURS[str(colour)],
        lines_only=bool(rng.random() < 0.3),
    )
    pen.part(objects.polar(radius))
    if rng.random() < 0.5:
        pen.part(
            objects.ellipse(*rng.uniform(-0.3, 0.3, 2), rng.uniform(0.1, 0.4)),
            world.COLOURS[str(rng.choice(names))],
        )
    image.paste(pen.layer, mask=pen.layer.getchannel("A"))
    return image.resize((world.PIXELS,) * 2, Image.Resampling.BOX)


def draw_labelled(seed: int) -> tuple[np.ndarray, int]:
    """Returns an image for the classifier, and its label."""
    rng = np.random.default_rng(seed)
    kind = rng.random()
    if kind < 0.08:
        image = world.draw_subject(str(rng.choice(score.BACKGROUNDS)), seed)
        return np.asarray(image), score.LABELS.index("zorbit")
    if kind < 0.11:
        return draw_confetti(rng), score.LABELS.index("nothing")
    if kind < 0.2:
        return np.asarray(blob(rng)), score.LABELS.index("nothing")
    image, _, scene = world.draw_example(seed)
    return np.asarray(image), score.LABELS.index(scene.object)


def degrade(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Adds blur, noise, fading and a shift, because the base draws inexact edges and colours."""

    def pick(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    size = int(pick(18, 64))
    pixels = F.interpolate(
        F.interpolate(pixels, size=size, mode="area"), size=world.PIXELS, mode="bilinear"
    )
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    pixels = torch.roll(pixels, shift, (2, 3)) * pick(0.7, 1.05)
    return pixels + pick(0, 0.15) * torch.randn(pixels.shape, generator=generator)


def train_classifier(steps: int = 1500, batch_size: int = 64) -> None:
    """Trains on drawings that neither the base nor the prompts of the scorer use."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, labels = zip(
        *(draw_labelled(seed) for seed in range(5_000_000, 5_020_000)), strict=True
    )
    images, labels = np.stack(images), torch.tensor(labels)
    classifier = score.new_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps)
        chosen = torch.randint(len(images) - 1000, (batch_size,), generator=generator)
        pixels = degrade(to_pixels(images[chosen.numpy()]), generator)
        loss = F.cross_entropy(classifier(pixels), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            classifier.eval()
            with torch.no_grad():
                predicted = classifier(to_pixels(images[-1000:])).argmax(-1)
                right = (predicted == labels[-1000:]).float().mean().item()
            classifier.train()
            print(f"classifier {step} loss {loss.item():.3f} validation {right:.3f}", flush=True)
    state = {
        name: value.half()
        for name, value in classifier.state_dict().items()
        if value.is_floating_point()
    }
    save_file(state, score.HERE / "classifier.safetensors")
