"""`python -m trainer convert | compose | resize | extract | merge`: adapter files in, adapter files or a base out.

With --json each line of output is one object: {"progress": [done, total]} as it goes, the result at the end. The page reads that.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, ModelError

DIALECTS = ("kohya", "diffusers", "peft")
PRECISIONS = ("fp16", "bf16", "fp32")
STEP = 0.5  # seconds between two signs of progress


def add_commands(commands: Any) -> None:
    convert = _command(
        commands,
        "convert",
        convert_command,
        "write an adapter file in another dialect or precision",
    )
    convert.add_argument("file", type=Path)
    convert.add_argument("--to", choices=DIALECTS, default="kohya", dest="dialect")
    _output(convert)

    compose = _command(commands, "compose", compose_command, "put several adapters into one")
    _stack(compose)
    _size(compose, "0: exact, the ranks add up")
    _output(compose, dialect=True)

    resize = _command(
        commands,
        "resize",
        resize_command,
        "make an adapter smaller by its singular values, and say what is kept",
    )
    resize.add_argument("file", type=Path)
    _size(resize, "0: as --energy asks")
    _output(resize, dialect=True)

    extract = _command(
        commands, "extract", extract_command, "make an adapter from the difference of two bases"
    )
    extract.add_argument("--base", required=True, help="the plain base")
    extract.add_argument("--tuned", required=True, help="the base that was trained further")
    extract.add_argument("--conv", action="store_true", help="convolutions too")
    _prediction(extract)
    _size(extract, "0: as --energy asks", rank=32)
    _output(extract, dialect=True)

    merge = _command(commands, "merge", merge_command, "put adapters into the weights of a base")
    _stack(merge)
    merge.add_argument(
        "--base", required=True, help="a folder, a .safetensors file or a Hugging Face id"
    )
    _prediction(merge)
    merge.add_argument(
        "--prove",
        action="store_true",
        help="read the result, take the adapters off again and show what is left",
    )
    merge.add_argument(
        "--precision", choices=PRECISIONS, default="fp16", help="of a folder; a file keeps its own"
    )
    merge.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a folder, or a .safetensors file where the base is one",
    )


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="progress and result as JSON lines")
    parser.set_defaults(command=run)
    return parser


def _stack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE[:STRENGTH[:TEXT]]",
        help="as often as wanted; TEXT: in the text encoders",
    )


def _prediction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prediction",
        choices=("auto", "epsilon", "v"),
        default="auto",
        help="base.prediction, for a base that does not tell what it predicts",
    )


def _size(parser: argparse.ArgumentParser, zero: str, rank: int = 0) -> None:
    parser.add_argument("--rank", type=int, default=rank, help=f"largest rank of a module ({zero})")
    parser.add_argument(
        "--energy",
        type=float,
        default=1.0,
        help="share of the squared singular values to keep, such as 0.95",
    )


def _output(parser: argparse.ArgumentParser, dialect: bool = False) -> None:
    if dialect:
        parser.add_argument(
            "--to",
            choices=DIALECTS,
            default="",
            dest="dialect",
            help="left out: what most programs read for this base",
        )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument(
        "--family", default="", help="such as sdxl; only where the file does not tell"
    )
    parser.add_argument("--output", type=Path, required=True)


def stacked(text: str) -> dict[str, Any]:
    """ "a.safetensors:0.8:0.5" -> file and strengths; a colon inside the path (C:\\...) is no strength."""
    file = text
    strengths: list[str] = []
    while (
        len(strengths) < 2
        and not (file.endswith(".safetensors") or Path(file).exists())
        and ":" in file
    ):
        file, _, strength = file.rpartition(":")
        strengths.insert(0, strength)
    try:
        return {
            "file": file,
            **dict(zip(("strength", "text_strength"), map(float, strengths), strict=False)),
        }
    except ValueError:
        raise ConfigError(
            f"--adapter takes FILE, FILE:STRENGTH or FILE:STRENGTH:TEXT, for example maya.safetensors:0.8; got {text!r}."
        ) from None


class Report:
    """Progress and result, for people or as JSON lines."""

    def __init__(self, as_json: bool):
        self._as_json, self._last = as_json, time.monotonic()

    def progress(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= STEP:
            self._last = time.monotonic()
            print(
                json.dumps({"progress": [done, total]}) if self._as_json else f"{done} of {total}",
                flush=True,
                file=self._stream,
            )

    @property
    def _stream(self):
        return sys.stdout if self._as_json else sys.stderr

    def result(self, **facts: Any) -> int:
        if self._as_json:
            print(json.dumps(facts, ensure_ascii=False), flush=True)
        else:
            for key, value in facts.items():
                if not isinstance(value, list):
                    print(f"{key.replace('_', ' ') + ':':22}{value}")
        return 0


def convert_command(options: argparse.Namespace) -> int:
    from trainer.lora.formats.reader import read_adapter

    file = read_adapter(options.file)
    return _write(options, Report(options.json), file.modules, [file], remarks=file.notes)


def compose_command(options: argparse.Namespace) -> int:
    from trainer.lora import transform

    report, layers = Report(options.json), _layers(options.adapter)
    _check_size(options)
    modules = transform.compose(layers)
    told: dict[str, Any] = {}
    if options.rank or options.energy < 1:
        modules, kept = transform.resize(modules, options.rank, options.energy, report.progress)
        told = _kept(kept)
    return _write(options, report, modules, [layer.file for layer in layers], **told)


def resize_command(options: argparse.Namespace) -> int:
    from trainer.lora import transform
    from trainer.lora.formats.reader import read_adapter

    report, file = Report(options.json), read_adapter(options.file)
    _check_size(options)
    modules, kept = transform.resize(file.modules, options.rank, options.energy, report.progress)
    return _write(options, report, modules, [file], **_kept(kept))


def extract_command(options: argparse.Namespace) -> int:
    import torch

    from trainer.config import Base
    from trainer.families import load_base
    from trainer.lora import transform

    report = Report(options.json)
    _check_size(options)
    plain, tuned = (
        load_base(Base(model=name, prediction=options.prediction), torch.float32)
        for name in (options.base, options.tuned)
    )
    modules, kept = transform.extract(
        plain, tuned, options.rank, options.energy, options.conv, report.progress
    )
    return _write(options, report, modules, [], family=plain.family, **_kept(kept))


def merge_command(options: argparse.Namespace) -> int:
    import torch
    from safetensors.torch import save_file

    from trainer.config import Base
    from trainer.families import load_base
    from trainer.lora import merging
    from trainer.models.device import DTYPES
    from trainer.models.safetensors_header import read_header
    from trainer.runs.atomic_files import WRITING, atomic_folder

    report, layers, chosen = (
        Report(options.json),
        _layers(options.adapter),
        Base(model=options.base, prediction=options.prediction),
    )
    _check_free(options.output)
    base = load_base(chosen, torch.float32)
    is_file = options.output.suffix == ".safetensors"
    if is_file and not base.files.path.is_file():
        raise ConfigError(
            "A merged .safetensors file needs a base that is one; give --output the name of a folder."
        )
    added = merging.merge(base, layers, report.progress)
    if is_file:
        tensors = merging.merged_checkpoint(
            base.files.path, load_base(chosen, torch.float32), added
        )
        partial = options.output.with_name(f"{WRITING}{options.output.name}")
        told = {
            key: value
            for key, value in read_header(base.files.path).metadata.items()
            if "hash" not in key
        }
        try:
            save_file(tensors, partial, {"format": "pt"} | told)
            partial.replace(options.output)
        finally:
            partial.unlink(missing_ok=True)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(options.output) as folder:
            merging.save_base(base, folder, DTYPES[options.precision])
    facts: dict[str, Any] = {"file": str(options.output), "changed": f"{len(added)} layers"}
    if options.prove:
        left = merging.remaining_difference(
            load_base(chosen.model_copy(update={"model": str(options.output)}), torch.float32),
            load_base(chosen, torch.float32),
            added,
        )
        facts["left_after_undoing"] = (
            f"{left:.1e} of the largest weight in a layer, which is the rounding of the stored weights"
        )
    return report.result(**facts)


def _layers(adapters: Sequence[str]) -> list:
    from trainer.lora.apply import WeightedAdapter
    from trainer.lora.formats.reader import read_adapter

    layers = []
    for given in map(stacked, adapters):
        strength = given.get("strength", 1.0)
        layers.append(
            WeightedAdapter(
                read_adapter(Path(given["file"])), strength, given.get("text_strength", strength)
            )
        )
    return layers


def _check_size(options: argparse.Namespace) -> None:
    if options.rank < 0 or not 0 < options.energy <= 1:
        raise ConfigError(
            f"--rank is 0 or more and --energy above 0 up to 1; got {options.rank} and {options.energy:g}."
        )


def _check_free(output: Path) -> None:
    if output.exists():
        raise ConfigError(
            f"{output} is there already; nothing is overwritten. Choose another name."
        )


def _kept(kept: Sequence) -> dict[str, Any]:
    from trainer.lora.transform import total_energy

    worst = min(kept, key=lambda module: module.energy)
    return {
        "kept_energy": f"{total_energy(kept):.2%}",
        "worst_module": f"{worst.component}.{worst.name}, {worst.energy:.2%} at rank {worst.rank}",
        "by_module": [
            {"name": f"{m.component}.{m.name}", "rank": m.rank, "energy": round(m.energy, 6)}
            for m in kept
        ],
    }


def _write(
    options: argparse.Namespace,
    report: Report,
    modules: list,
    files: list,
    family: Any = None,
    **facts: Any,
) -> int:
    """Saves the modules, reads them back and compares, and says so."""
    from trainer.lora import metadata, transform, writer
    from trainer.models.device import DTYPES

    _check_free(options.output)
    if options.family:
        known = sorted(transform.FAMILIES)
        if options.family not in known:
            raise ConfigError(f"--family takes one of {', '.join(known)}; got {options.family!r}.")
    family = family or transform.family_for(files[0], options.family)
    dialect = options.dialect or family.default_format
    values = metadata.metadata_of_tool(options.output.stem, modules, files, family)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    writer.save_adapter(options.output, dialect, modules, family, DTYPES[options.precision], values)
    try:
        writer.verify(options.output, modules)
    except ModelError:
        writer.discard(options.output)
        raise
    ranks = sorted({module.rank for module in modules if module.rank})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
    facts = {key: value for key, value in facts.items() if value}
    return report.result(file=str(options.output), dialect=dialect, rank=rank, **facts)
