"""The recipes in `presets/`: one commented TOML each, found by looking into the folder.

A preset pins what only works together: rank, alpha, learning rates, targets and length.
"""

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer import config
from trainer.errors import ConfigError

PRESETS_FOLDER = Path(__file__).resolve().parents[2] / "presets"


@dataclass(frozen=True)
class Preset:
    name: str
    """The file's stem; goes into `RunConfig.preset`."""
    title: str
    purpose: str
    """What it is for, in one line."""
    pictures: str
    """How many pictures it wants: "10 to 30"."""
    memory: str
    time: str
    order: int
    config: config.RunConfig
    hash: str
    """First 12 digits of the sha256 of the file: which edition of the recipe made an adapter."""


@cache
def load_presets() -> dict[str, Preset]:
    """All presets by name, in the order in which the page shows them."""
    presets = [read(path) for path in PRESETS_FOLDER.glob("*.toml")]
    return {preset.name: preset for preset in sorted(presets, key=lambda p: (p.order, p.name))}


def load_preset(name: str) -> Preset:
    """Raises ConfigError that lists the names there are."""
    presets = load_presets()
    if name not in presets:
        raise ConfigError(f"There is no preset named {name!r}. There are: {', '.join(presets)}.")
    return presets[name]


def read(path: Path) -> Preset:
    """One preset file. Raises ConfigError for one that cannot be used."""
    content = path.read_bytes()
    about = tomllib.loads(content.decode("utf-8"))["about"]
    recipe = config.load(path)
    return Preset(
        name=path.stem,
        config=config.replace(recipe, {"preset": path.stem}),
        hash=hashlib.sha256(content).hexdigest()[:12],
        **about,
    )
