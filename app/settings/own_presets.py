"""The presets on the page: those that ship, and the user's own in `outputs/presets/own-*.toml`."""

from pathlib import Path

import tomlkit

from trainer import config
from trainer.config import RunConfig, presets
from trainer.config.presets import Preset
from trainer.errors import ConfigError
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write

MAX_TITLE_LENGTH = 60
ORDER = 100
"""Position on the page: behind the presets that ship."""

SETTINGS_OF_ONE_RUN = ("name", "dataset.folder", "dataset.trigger", "sampling.prompts")
"""Settings that belong to one dataset, so a preset does not contain them."""


def folder() -> Path:
    return run_folder.outputs_folder() / "presets"


def all_presets() -> dict[str, Preset]:
    """Returns all presets by name, the user's own ones last."""
    return presets.load_presets() | own()


def own() -> dict[str, Preset]:
    """Returns the user's own presets by name.

    Leaves out files that were edited by hand and are not valid; they count again once corrected.
    """
    found = {}
    for path in sorted(folder().glob("own-*.toml")):
        try:
            found[path.stem] = presets.read(path)
        except (ConfigError, OSError):
            continue
    return found


def save(title: str, run: RunConfig) -> str:
    """Saves settings as a preset, and returns its name. Replaces an own preset of this title."""
    title = " ".join(title.split())[:MAX_TITLE_LENGTH]
    if not title:
        raise ConfigError("The preset has no name. Give it one.")
    defaults = {path: config.get(RunConfig(), path) for path in SETTINGS_OF_ONE_RUN}
    settings = config.replace(run, defaults | {"preset": ""})
    rank, rate = settings.adapter.rank, settings.training.learning_rate
    about = tomlkit.document()
    about["about"] = {
        "title": title,
        "purpose": f"My own preset, rank {rank} at a learning rate of {rate:g}.",
        "pictures": "Any number of",
        "memory": "",
        "time": "as long as it takes",
        "order": ORDER,
    }
    name = _name_for(title)
    folder().mkdir(parents=True, exist_ok=True)
    text = config.to_toml(settings) + "\n" + tomlkit.dumps(about)
    atomic_write(folder() / f"{name}.toml", text)
    return name


def _name_for(title: str) -> str:
    """Returns the name of the own preset of this title, or a free name for a new one.

    Different titles may have one slug, so names after the first end in a number.
    """
    known = own()
    slug = f"own-{run_folder.slug(title)}"
    name, number = slug, 1
    while True:
        if name in known and known[name].title == title:
            return name
        if name not in known and not (folder() / f"{name}.toml").exists():
            return name
        number += 1
        name = f"{slug}-{number}"


def remove(name: str) -> None:
    """Deletes one of the user's own presets. Raises ConfigError for any other name."""
    if name not in own():
        raise ConfigError(f"{name} is not one of your own presets. Only those can be removed.")
    (folder() / f"{name}.toml").unlink()
