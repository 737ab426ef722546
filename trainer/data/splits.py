"""How many images are trained, at which sizes, and how many are held out: from the settings alone."""

from trainer.config import RunConfig

SMALLEST_SET_TO_HOLD_OUT = 10


def held_out_count(run: RunConfig, images: int) -> int:
    """Returns how many of so many images are held out for validation."""
    return round(images * run.dataset.hold_out) if images >= SMALLEST_SET_TO_HOLD_OUT else 0


def resolutions(run: RunConfig) -> tuple[int, ...]:
    """Returns the resolutions at which each image is trained, in pixels."""
    return run.dataset.resolution, *run.dataset.resolutions


def looks_per_image(run: RunConfig) -> int:
    """Returns how many versions of an image are cached at each resolution (see `augment.looks`)."""
    dataset = run.dataset
    return (dataset.variants if dataset.random_crop or dataset.colour_jitter else 1) * (
        2 if dataset.flip else 1
    )
