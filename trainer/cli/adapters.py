"""The commands that make an adapter file from others: convert, compose, resize and extract."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli import adapter_options
from trainer.cli.adapter_options import FORMATS, Report
from trainer.cli.run_options import Commands
from trainer.errors import ConfigError, ModelError

# The command functions import torch themselves: it would slow `--help` down.
if TYPE_CHECKING:
    from trainer.families.base import ModelFamily
    from trainer.lora.formats.adapted_module import AdaptedModule
    from trainer.lora.formats.reader import AdapterFile
    from trainer.lora.transform import ResizedModule


def add_commands(commands: Commands) -> None:
    convert = adapter_options.add_command(
        commands,
        "convert",
        convert_command,
        "write an adapter file in another format or precision",
    )
    convert.add_argument("file", type=Path)
    convert.add_argument("--to", choices=FORMATS, default="kohya", dest="format")
    adapter_options.add_output_options(convert)

    compose = adapter_options.add_command(
        commands, "compose", compose_command, "combine several adapters into one"
    )
    adapter_options.add_adapters_option(compose)
    adapter_options.add_size_options(compose, "0: exact, the ranks add up")
    adapter_options.add_format_option(compose)
    adapter_options.add_output_options(compose)

    resize = adapter_options.add_command(
        commands,
        "resize",
        resize_command,
        "make an adapter smaller by its singular values, and show how much is kept",
    )
    resize.add_argument("file", type=Path)
    adapter_options.add_size_options(resize, "0: only --energy limits it")
    adapter_options.add_format_option(resize)
    adapter_options.add_output_options(resize)

    extract = adapter_options.add_command(
        commands, "extract", extract_command, "make an adapter from the difference of two bases"
    )
    extract.add_argument("--base", required=True, help="the original base")
    extract.add_argument("--tuned", required=True, help="the base that was trained further")
    extract.add_argument("--conv", action="store_true", help="include convolutions")
    adapter_options.add_prediction_option(extract)
    adapter_options.add_size_options(extract, "0: only --energy limits it", rank=32)
    adapter_options.add_format_option(extract)
    adapter_options.add_output_options(extract)


def convert_command(options: argparse.Namespace) -> int:
    from trainer.lora.formats.reader import read_adapter

    file = read_adapter(options.file)
    return _save(options, Report(options.json), file.modules, [file], {"remarks": file.notes})


def compose_command(options: argparse.Namespace) -> int:
    from trainer.lora import transform

    report = Report(options.json)
    adapters = adapter_options.read_adapters(options.adapter)
    size = adapter_options.parse_size(options)
    modules = transform.compose(adapters)
    kept = {}
    if size.rank or size.energy < 1:
        modules, resized = transform.resize(modules, size.rank, size.energy, report.progress)
        kept = _describe_kept(resized)
    return _save(options, report, modules, [adapter.file for adapter in adapters], kept)


def resize_command(options: argparse.Namespace) -> int:
    from trainer.lora import transform
    from trainer.lora.formats.reader import read_adapter

    report = Report(options.json)
    file = read_adapter(options.file)
    size = adapter_options.parse_size(options)
    modules, resized = transform.resize(file.modules, size.rank, size.energy, report.progress)
    return _save(options, report, modules, [file], _describe_kept(resized))


def extract_command(options: argparse.Namespace) -> int:
    import torch

    from trainer.config import Base
    from trainer.families import load_base
    from trainer.lora import transform

    report = Report(options.json)
    size = adapter_options.parse_size(options)
    original, tuned = (
        load_base(Base(model=model, prediction=options.prediction), torch.float32)
        for model in (options.base, options.tuned)
    )
    modules, resized = transform.extract(
        original, tuned, size.rank, size.energy, options.conv, report.progress
    )
    kept = _describe_kept(resized)
    return _save(options, report, modules, [], kept, original.family)


def _describe_kept(resized: "Sequence[ResizedModule]") -> dict[str, Any]:
    """Returns how much of the singular values is kept, in all and by module."""
    from trainer.lora.transform import total_energy

    worst = min(resized, key=lambda module: module.energy)
    by_module = [
        {
            "name": f"{module.component}.{module.name}",
            "rank": module.rank,
            "energy": round(module.energy, 6),
        }
        for module in resized
    ]
    return {
        "kept_energy": f"{total_energy(resized):.2%}",
        "worst_module": f"{worst.component}.{worst.name}, {worst.energy:.2%} at rank {worst.rank}",
        "by_module": by_module,
    }


def _save(
    options: argparse.Namespace,
    report: Report,
    modules: "list[AdaptedModule]",
    sources: "list[AdapterFile]",
    values: dict[str, Any],
    family: "ModelFamily | None" = None,
) -> int:
    """Saves the modules, checks the file by reading it back, and reports it.

    `values` are added to the report if they are not empty.
    """
    from trainer.families import FAMILIES
    from trainer.lora import metadata, transform, writer
    from trainer.models.device import DTYPES

    output: Path = options.output
    adapter_options.check_free(output)
    if options.family and options.family not in FAMILIES:
        names = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"--family takes one of {names}; got {options.family!r}.")
    if family is None:
        family = transform.family_for(sources[0], options.family)
    file_format = options.format or family.default_format
    tags = metadata.metadata_of_tool(output.stem, modules, sources, family)
    output.parent.mkdir(parents=True, exist_ok=True)
    writer.save_adapter(output, file_format, modules, family, DTYPES[options.precision], tags)
    try:
        writer.verify(output, modules)
    except ModelError:
        writer.discard(output)
        raise
    result = {"file": str(output), "dialect": file_format, "rank": _describe_ranks(modules)}
    report.result(result | {key: value for key, value in values.items() if value})
    return 0


def _describe_ranks(modules: "list[AdaptedModule]") -> str:
    ranks = {module.rank for module in modules if module.rank}
    if not ranks:
        return "none"
    return f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
