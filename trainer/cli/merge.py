"""The command that merges adapters into the weights of a base: merge."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli import adapter_options
from trainer.cli.adapter_options import PRECISIONS, Report
from trainer.cli.run_options import Commands
from trainer.config import Base
from trainer.errors import ConfigError

# The command functions import torch themselves: it would slow `--help` down.
if TYPE_CHECKING:
    from torch import Tensor


def add_commands(commands: Commands) -> None:
    merge = adapter_options.add_command(
        commands, "merge", merge_command, "merge adapters into the weights of a base"
    )
    adapter_options.add_adapters_option(merge)
    merge.add_argument(
        "--base", required=True, help="a folder, a .safetensors file or a Hugging Face id"
    )
    adapter_options.add_prediction_option(merge)
    merge.add_argument(
        "--prove",
        action="store_true",
        help="read the result, subtract the adapters and show what is left",
    )
    merge.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp16",
        help="precision of a folder; a file keeps the base's precision",
    )
    merge.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a folder, or a .safetensors file if the base is one",
    )


def merge_command(options: argparse.Namespace) -> int:
    import torch

    from trainer.families import load_base
    from trainer.lora import merging
    from trainer.models.device import DTYPES
    from trainer.runs.atomic_files import atomic_folder

    report = Report(options.json)
    adapters = adapter_options.read_adapters(options.adapter)
    output: Path = options.output
    source = Base(model=options.base, prediction=options.prediction)
    adapter_options.check_free(output)
    base = load_base(source, torch.float32)
    is_file = output.suffix == ".safetensors"
    if is_file and not base.files.path.is_file():
        raise ConfigError(
            "Only a base that is a .safetensors file can be merged into one. "
            "Pass the name of a folder as --output."
        )
    added = merging.merge(base, adapters, report.progress)
    if is_file:
        _save_file(base.files.path, source, added, output)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(output) as folder:
            merging.save_base(base, folder, DTYPES[options.precision])
    result = {"file": str(output), "changed": f"{len(added)} layers"}
    if options.prove:
        merged = load_base(source.model_copy(update={"model": str(output)}), torch.float32)
        left = merging.remaining_difference(merged, load_base(source, torch.float32), added)
        result["left_after_undoing"] = (
            f"{left:.1e} of the largest weight in a layer, which is the rounding of the stored "
            "weights"
        )
    report.result(result)
    return 0


def _save_file(
    base_file: Path, source: Base, added: "dict[tuple[str, str], Tensor]", output: Path
) -> None:
    """Writes a single-file base with the added weights, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    from trainer.families import load_base
    from trainer.lora import merging
    from trainer.models.safetensors_header import read_header
    from trainer.runs.atomic_files import WRITING

    # `merge` changed the loaded base, and the keys are found by the original weights.
    tensors = merging.merged_checkpoint(base_file, load_base(source, torch.float32), added)
    metadata = {"format": "pt"}
    for key, value in read_header(base_file).metadata.items():
        # The hashes describe the unmerged weights.
        if "hash" not in key:
            metadata[key] = value
    unfinished = output.with_name(f"{WRITING}{output.name}")
    try:
        save_file(tensors, unfinished, metadata)
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
