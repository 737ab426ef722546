"""The adapter as a file: kohya's dialect, which most programs read, diffusers', or a PEFT folder.

Our own writer: the converters of diffusers and PEFT write names or alphas that others drop.
Keys, scale and metadata follow docs/formats.md.
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

FILE_ERROR_LIMIT = 0.02  # of a module's delta W; rounding to fp16 or bf16 stays well below


def save_adapter(
    path: Path,
    dialect: str,
    modules: Sequence[AdaptedModule],
    family: ModelFamily,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Writes a file, or PEFT's folder, whole or not at all. Raises ModelError where the dialect has no words for the adapter's kind."""
    if dialect == "peft":
        parts = to_peft(modules, family, dtype)
        with atomic_folder(path) as folder:
            for component, (tensors, config) in parts.items():
                (folder / component).mkdir()
                (folder / component / PEFT_CONFIG).write_text(
                    json.dumps(config, indent=1), encoding="utf-8"
                )
                (folder / component / PEFT_WEIGHTS).write_bytes(serialize(tensors, metadata))
    else:
        atomic_write(path, serialize(WRITERS[dialect](modules, family, dtype), metadata))


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A whole .safetensors, with the hashes by which A1111 and Civitai know it."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"The adapter holds numbers that are not finite (in {broken[0]}), so it was not saved. "
            "Lower the learning rate, or save in fp32 if the values are only too large for fp16."
        )
    plain = save(tensors)
    digest = hashlib.sha256(plain[8 + struct.unpack("<Q", plain[:8])[0] :]).hexdigest()
    return save(
        tensors, {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    )


WRITERS: dict[
    str, Callable[[Iterable[AdaptedModule], ModelFamily, torch.dtype], dict[str, Tensor]]
] = {
    "kohya": to_kohya,
    "diffusers": to_diffusers,
}


def copy_adapter(source: Path, target: Path, added: Mapping[str, str] | None = None) -> None:
    """The same file or folder under another name, whole or not at all. A file may get further metadata; its tensors stay to the byte."""
    if source.is_dir():
        with atomic_folder(target) as folder:
            copytree(source, folder, dirs_exist_ok=True)
    else:
        atomic_write(
            target, _with_metadata(source.read_bytes(), added) if added else source.read_bytes()
        )


def _with_metadata(content: bytes, added: Mapping[str, str]) -> bytes:
    """Only the header changes (its length, JSON, then the tensors: the safetensors format), so the hash of the tensors holds."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header["__metadata__"] = header.get("__metadata__", {}) | added
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text + content[end:]


def discard(path: Path) -> None:
    """Takes away a file or folder that is not what it should be."""
    if path.is_dir():
        rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verify(path: Path, modules: Iterable[AdaptedModule]) -> AdapterFile:
    """Reads a saved file back and compares each delta W with what it should be. Raises ModelError where it differs."""
    file = read_adapter(path)
    wanted = {(m.component, m.name.removeprefix("text_model.")): m for m in modules}
    found = {(m.component, m.name): m for m in file.modules}
    if missing := [key for key in wanted if key not in found]:
        raise ModelError(
            f"The saved file {path.name} lacks {len(missing)} of {len(wanted)} modules, such as {'.'.join(missing[0])}."
        )
    if extra := [key for key in found if key not in wanted and found[key].delta.any()]:
        raise ModelError(
            f"The saved file {path.name} changes {'.'.join(extra[0])}, which was not trained."
        )
    norms = {key: float(direction(module).norm()) for key, module in wanted.items()}
    negligible = (
        max(norms.values()) / 1000 or 1.0
    )  # a query over a single token gets no gradient: what is left of it rounds to nothing in fp16
    for key, module in wanted.items():
        error = float((direction(found[key]) - direction(module)).norm()) / max(
            norms[key], negligible
        )
        lengths = [
            m.tensors["dora_scale"].flatten()
            for m in (found[key], module)
            if "dora_scale" in m.tensors
        ]
        if len(lengths) == 2:
            error = max(error, float((lengths[0] - lengths[1]).norm() / lengths[1].norm()))
        if not error <= FILE_ERROR_LIMIT or len(lengths) == 1:
            raise ModelError(
                f"The saved file {path.name} does not do what was trained (off by {error:.1%} in {'.'.join(key)})."
            )
    return file


def direction(module: AdaptedModule) -> Tensor:
    """delta W without a DoRA's lengths, [outputs, the rest]."""
    return module.delta.flatten(1)
