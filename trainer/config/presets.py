"""The presets in `presets/`, one commented TOML file each.

A preset sets what works only together: rank, alpha, learning rates, trained layers and length.
"""

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer.config import io
from trainer.config.settings import RunConfig
from trainer.errors import ConfigError

PRESETS_FOLDER = Path(__file__).resolve().parents[2] / "presets"


@dataclass(frozen=True)
class Preset:
    """The settings of a preset and the table [about] of its file."""

    name: str
    """The stem of the file name, which becomes `RunConfig.preset`."""
    title: str
    purpose: str
    """One line about what the preset is for."""
    pictures: str
    """How many images it needs: "10 to 30"."""
    memory: str
    time: str
    order: int
    """Position on the page, lowest first."""
    config: RunConfig
    hash: str
    """First 12 digits of the sha256 of the file. The metadata of an adapter contains it, so that
    the version of the preset is known."""


@cache
def load_presets() -> dict[str, Preset]:
    """Returns all presets by name, in the order of the page."""
    presets = [read(path) for path in PRESETS_FOLDER.glob("*.toml")]
    return {preset.name: preset for preset in sorted(presets, key=lambda p: (p.order, p.name))}


def load_preset(name: str) -> Preset:
    """Returns a preset. Raises ConfigError with all names if there is none of this name."""
    presets = load_presets()
    if name not in presets:
        raise ConfigError(
            f"There is no preset named {name!r}. Choose one of: {', '.join(presets)}."
        )
    return presets[name]


def read(path: Path) -> Preset:
    """Reads the file of a preset. Raises ConfigError if it is not valid."""
    content = path.read_bytes()
    settings = io.load(path)
    try:
        about = tomllib.loads(content.decode("utf-8-sig"))["about"]
        return Preset(
            name=path.stem,
            config=io.replace(settings, {"preset": path.stem}),
            hash=hashlib.sha256(content).hexdigest()[:12],
            **about,
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a preset: its table [about] is missing or wrong ({error})."
        ) from None
