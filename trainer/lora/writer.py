"""Writes an adapter to a file or PEFT folder, and checks that the file contains it.

`export` produces the tensors of each format.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from shutil import copytree, rmtree

import torch
from safetensors.torch import save
from torch import Tensor

from trainer.errors import ModelError
from trainer.families.base import ModelFamily
from trainer.lora.export import to_diffusers, to_kohya, to_peft
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import PEFT_CONFIG, PEFT_WEIGHTS, AdapterFile, read_adapter
from trainer.runs.atomic_files import atomic_folder, atomic_write

FILE_ERROR_LIMIT = 0.02
"""Largest relative error of a module in a saved file. Rounding to bf16 makes less than 0.01."""
NEGLIGIBLE_NORM = 1 / 1000
"""Of the largest delta W in the file. The error of a smaller one is compared with this norm."""

Exporter = Callable[[Iterable[AdaptedModule], ModelFamily, torch.dtype], dict[str, Tensor]]
WRITERS: dict[str, Exporter] = {"kohya": to_kohya, "diffusers": to_diffusers}
"""Formats of a single file."""


def save_adapter(
    path: Path,
    file_format: str,
    modules: Sequence[AdaptedModule],
    family: ModelFamily,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Writes a file, or a folder for the format "peft", completely or not at all.

    Raises ModelError if the format cannot contain this kind of adapter, or if a number is not
    finite.
    """
    if file_format != "peft":
        tensors = WRITERS[file_format](modules, family, dtype)
        atomic_write(path, serialize(tensors, metadata))
        return
    parts = to_peft(modules, family, dtype)
    with atomic_folder(path) as folder:
        for component, (tensors, config) in parts.items():
            (folder / component).mkdir()
            config_text = json.dumps(config, indent=1)
            (folder / component / PEFT_CONFIG).write_text(config_text, encoding="utf-8")
            (folder / component / PEFT_WEIGHTS).write_bytes(serialize(tensors, metadata))


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Returns the content of a .safetensors file.

    Adds the hash of the tensors to the metadata, by which A1111 and Civitai identify a file.
    Raises ModelError if a number is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"The adapter was not saved, because it contains numbers that are not finite (in "
                f"{name}). Lower the learning rate. If the values are only too large for fp16, "
                "save in fp32."
            )
    digest = hashlib.sha256(_split_header(save(tensors))[1]).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    content: bytes = save(tensors, {**metadata, **hashes})
    return content


def verify(path: Path, modules: Iterable[AdaptedModule]) -> AdapterFile:
    """Reads a saved file back and compares it with the modules that it should contain.

    The relative error of a module is |delta W in the file - delta W| / |delta W|, with Frobenius
    norms, and may be up to FILE_ERROR_LIMIT. For a DoRA the norms in dora_scale are compared in
    the same way, and delta W without them. The file may contain further modules if they change
    nothing, such as those that complete an attention of OpenCLIP.

    Returns the content of the file. Raises ModelError if it differs.
    """
    file = read_adapter(path)
    expected = {_key(module): module for module in modules}
    saved = {_key(module): module for module in file.modules}

    missing = [key for key in expected if key not in saved]
    if missing:
        raise ModelError(
            f"The saved file {path.name} lacks {len(missing)} of {len(expected)} modules, such as "
            f"{'.'.join(missing[0])}."
        )
    for key, module in saved.items():
        if key not in expected and module.delta.any():
            raise ModelError(
                f"The saved file {path.name} changes {'.'.join(key)}, which was not trained."
            )

    # A query over a single token gets no gradient. What weight decay leaves of such a module
    # rounds to zero in fp16, so its error is compared with a minimum norm.
    norms = [float(module.delta.norm()) for module in expected.values()]
    min_norm = max(norms) * NEGLIGIBLE_NORM or 1.0
    for key, module in expected.items():
        error = _relative_error(saved[key], module, min_norm)
        if not error <= FILE_ERROR_LIMIT:
            raise ModelError(
                f"The saved file {path.name} does not do what was trained: {'.'.join(key)} "
                f"differs by {error:.1%}, and the limit is {FILE_ERROR_LIMIT:.0%}."
            )
    return file


def _key(module: AdaptedModule) -> tuple[str, str]:
    return module.component, module.name.removeprefix("text_model.")


def _relative_error(saved: AdaptedModule, expected: AdaptedModule, min_norm: float) -> float:
    """Returns the larger error of delta W and dora_scale: infinite if only one has a dora_scale."""
    wanted = expected.delta.flatten(1)
    difference = float((saved.delta.flatten(1) - wanted).norm())
    error = difference / max(float(wanted.norm()), min_norm)
    has_norms = ["dora_scale" in module.tensors for module in (saved, expected)]
    if not any(has_norms):
        return error
    if not all(has_norms):
        return float("inf")
    norms = expected.tensors["dora_scale"].flatten()
    norm_error = (saved.tensors["dora_scale"].flatten() - norms).norm() / norms.norm()
    return max(error, float(norm_error))


def copy_adapter(source: Path, target: Path, added: Mapping[str, str] | None = None) -> None:
    """Copies a file or folder completely or not at all.

    A file can get additional metadata. Its tensors do not change.
    """
    if source.is_dir():
        with atomic_folder(target) as folder:
            copytree(source, folder, dirs_exist_ok=True)
        return
    content = source.read_bytes()
    atomic_write(target, _with_metadata(content, added) if added else content)


def _with_metadata(content: bytes, added: Mapping[str, str]) -> bytes:
    """Returns a .safetensors file with more metadata. The hash of the tensors stays valid."""
    header_text, tensors = _split_header(content)
    header = json.loads(header_text)
    header["__metadata__"] = header.get("__metadata__", {}) | added
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text + tensors


def _split_header(content: bytes) -> tuple[bytes, bytes]:
    """Returns the JSON header and the tensors of a .safetensors file.

    The format is the length of the header in eight bytes, the header, then the tensors.
    """
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def discard(path: Path) -> None:
    """Deletes a file or folder that failed `verify`."""
    if path.is_dir():
        rmtree(path)
    else:
        path.unlink(missing_ok=True)
