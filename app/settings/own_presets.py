"""The recipes to choose from: those that ship, and those that the person saved from the form (`outputs/presets/own-*.toml`)."""

import itertools
from pathlib import Path

import tomlkit

from trainer import config
from trainer.config import RunConfig, presets
from trainer.config.presets import Preset
from trainer.errors import ConfigError
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write

OF_ONE_RUN = (
    "name",
    "dataset.folder",
    "dataset.trigger",
    "sampling.prompts",
)  # what belongs to the pictures, not to the recipe


def folder() -> Path:
    return run_folder.outputs_folder() / "presets"


def every() -> dict[str, Preset]:
    """All recipes by name; one's own last."""
    return presets.load_presets() | own()


def own() -> dict[str, Preset]:
    found = {}
    for path in sorted(folder().glob("own-*.toml")) if folder().is_dir() else []:
        try:
            found[path.stem] = presets.read(path)
        except (
            ConfigError,
            KeyError,
            TypeError,
            ValueError,
            OSError,
        ):  # changed by hand; it is looked at again when it is mended
            continue
    return found


def save(title: str, run: RunConfig) -> str:
    """Keeps the settings as a recipe of one's own; one of the same title is replaced. Returns its name."""
    title = " ".join(title.split())[:60]
    if not title:
        raise ConfigError("Give the recipe a name.")
    slug, known = f"own-{run_folder.slug(title)}", own()
    names = (
        slug if n == 1 else f"{slug}-{n}" for n in itertools.count(1)
    )  # two titles may have one slug
    name = next(
        n
        for n in names
        if (known[n].title == title if n in known else not (folder() / f"{n}.toml").exists())
    )
    bare = config.replace(
        run, {path: config.get(RunConfig(), path) for path in OF_ONE_RUN} | {"preset": ""}
    )
    about = tomlkit.document()
    about["about"] = {
        "title": title,
        "purpose": f"My own recipe, {bare.adapter.rank} ranks at {bare.training.learning_rate:g}.",
        "pictures": "Any number of",
        "memory": "",
        "time": "as long as it takes",
        "order": 100,
    }
    folder().mkdir(parents=True, exist_ok=True)
    atomic_write(folder() / f"{name}.toml", config.to_toml(bare) + "\n" + tomlkit.dumps(about))
    return name


def remove(name: str) -> None:
    """Takes a recipe of one's own away. Raises ConfigError for any other."""
    if name not in own():
        raise ConfigError("Only recipes of your own can be removed.")
    (folder() / f"{name}.toml").unlink()
