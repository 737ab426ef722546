"""Options that describe a run: a preset or a file, a dataset, and single settings."""

import argparse
from pathlib import Path

from trainer import config
from trainer.config import presets
from trainer.errors import ConfigError


def add_run_options(parser: argparse.ArgumentParser, what: str = "RUN.toml|PRESET") -> None:
    parser.add_argument(
        "recipe", metavar=what, help=f"a file, or one of: {', '.join(presets.load_presets())}"
    )
    parser.add_argument(
        "--dataset", type=Path, metavar="DIR", help="folder with pictures and captions"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="any setting of `train --help`, as often as wanted",
    )


def read_settings(options: argparse.Namespace) -> config.RunConfig:
    path = Path(options.recipe)
    run = (
        config.load(path)
        if path.suffix == ".toml" or path.is_file()
        else presets.load_preset(options.recipe).config
    )
    changes = dict(config.parse_setting(text) for text in options.settings)
    if options.dataset:
        changes["dataset.folder"] = str(options.dataset.resolve())
    if options.name:
        changes["name"] = options.name
    return config.replace(run, changes)


def read_run(options: argparse.Namespace) -> config.RunConfig:
    """The recipe of a training, with its pictures."""
    from trainer.training.runner import with_whole_paths  # imports torch

    run = read_settings(options)
    if not run.dataset.folder:
        raise ConfigError("Which pictures? Give --dataset DIR, or dataset.folder in the file.")
    return with_whole_paths(run)
