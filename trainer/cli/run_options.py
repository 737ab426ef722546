"""Options that describe a run: a preset or a settings file, a dataset, and single settings."""

import argparse
from pathlib import Path
from typing import TypeAlias

from trainer import config
from trainer.config import presets
from trainer.errors import ConfigError
from trainer.training.runner import with_whole_paths

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The commands of the parser, which `add_commands` adds to. argparse has no public name for it."""


def add_run_options(parser: argparse.ArgumentParser, metavar: str = "RUN.toml|PRESET") -> None:
    """Adds a positional argument for the settings, `--dataset` and `--set`."""
    names = ", ".join(presets.load_presets())
    parser.add_argument("source", metavar=metavar, help=f"a file, or one of: {names}")
    parser.add_argument(
        "--dataset", type=Path, metavar="DIR", help="folder with images and captions"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="any setting listed by `train --help`; can be repeated",
    )


def read_settings(options: argparse.Namespace) -> config.RunConfig:
    """Returns the settings of the file or preset, with the changes of the options.

    Raises ConfigError if the preset does not exist or a setting is invalid.
    """
    path = Path(options.source)
    if path.suffix == ".toml" or path.is_file():
        run = config.load(path)
    else:
        run = presets.load_preset(options.source).config
    changes = dict(config.parse_setting(text) for text in options.settings)
    if options.dataset:
        changes["dataset.folder"] = str(options.dataset.resolve())
    if options.name:
        changes["name"] = options.name
    return config.replace(run, changes)


def read_run(options: argparse.Namespace) -> config.RunConfig:
    """Returns the settings of a training, with absolute paths.

    Raises ConfigError also if they name no dataset.
    """
    run = read_settings(options)
    if not run.dataset.folder:
        raise ConfigError("No dataset: pass --dataset DIR, or set dataset.folder in the file.")
    return with_whole_paths(run)
