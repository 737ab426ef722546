"""The commands that train: train, resume and class-pictures."""

import argparse
from pathlib import Path
from typing import Any

from trainer import config
from trainer.cli.run_options import add_run_options, read_run, read_settings
from trainer.errors import ConfigError
from trainer.runs import run_folder
from trainer.training import launch


def add_commands(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train an adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains an adapter from a run.toml or a preset.",
        epilog=_settings_help(),
    )
    add_run_options(train)
    train.add_argument("--name", help="name of the adapter")
    train.set_defaults(command=train_command)

    classes = commands.add_parser(
        "class-pictures",
        help="make the class pictures of a recipe ahead of its training",
        description="Fills dataset.regularisation_folder with dataset.class_pictures pictures of dataset.class_words, made by the base.",
    )
    add_run_options(classes)
    classes.set_defaults(command=class_pictures_command, name=None)

    resume = commands.add_parser("resume", help="start or continue the run in a folder")
    resume.add_argument("folder", type=Path, metavar="RUN_DIR")
    resume.set_defaults(command=resume_command)


def _settings_help() -> str:
    lines = ["settings for --set (their defaults are those of the recipe):"]
    for path, field in config.fields():
        words = (
            f" one of {', '.join(map(str, config.choices(field)))}."
            if config.choices(field)
            else ""
        )
        words = (
            f" Some of {', '.join(several)}."
            if (several := config.several_choices(field))
            else words
        )
        lines.append(f"  {path}\n      {field.description}{words}")
    return "\n".join(lines).replace("%", "%%")


def resume_command(options: argparse.Namespace) -> int:
    from trainer.training.runner import run_in

    return run_in(options.folder)


def train_command(options: argparse.Namespace) -> int:
    from trainer.training.runner import run_in

    run = read_run(options)
    if not launch.is_one_of_several():
        return run_in(run_folder.create(run))
    from trainer.training.distributed import join

    world = join()
    return run_in(
        Path(world.agree_on_text(str(run_folder.create(run).resolve()) if world.is_main else "")),
        world,
    )


def class_pictures_command(options: argparse.Namespace) -> int:
    run = read_settings(options)
    if not run.dataset.class_pictures:
        raise ConfigError(
            "How many, of what, and where to? Set dataset.class_pictures, dataset.class_words and dataset.regularisation_folder."
        )
    from trainer.families import load_base
    from trainer.inference import class_images
    from trainer.models import libraries
    from trainer.models.device import DTYPES, choose_device, choose_precision

    libraries.configure_libraries()
    device = choose_device()
    base = load_base(run.base, DTYPES[choose_precision(run.base.precision, device)])
    made = class_images.generate_missing(
        run,
        base,
        device,
        lambda event: print(f"class picture {event.done + 1} of {event.total}", flush=True),
    )
    print(f"{made} made in {run.dataset.regularisation_folder}")
    return 0
