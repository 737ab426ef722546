"""What a .safetensors file says it holds, read from its header alone and without trust.

The header is checked whole before any library maps the file: a hostile one can claim tensors that
overlap, leave the file, or take minutes to parse (format: github.com/huggingface/safetensors).
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ModelError

HEADER_LIMIT = 16 * 2**20  # bytes; the header of SDXL, the largest we read, has 0.4 million
TENSOR_LIMIT = 20_000  # SDXL in one file has 2,515
DIMENSION_LIMIT = 8  # no weight has more than 5
ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")


@dataclass(frozen=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks a header. Raises ModelError that names the file and what is wrong with it."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= HEADER_LIMIT or length + 8 > size:
                raise _refuse(path, _what_it_is(prefix))
            content = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        data = json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise _refuse(path, "its header is damaged") from None
    if not isinstance(data, dict):
        raise _refuse(path, "its header is no table of tensors")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _refuse(path, "its metadata is no table of texts")
    if len(data) > TENSOR_LIMIT:
        raise _refuse(
            path, f"it claims {len(data):,} tensors; no model has more than {TENSOR_LIMIT:,}"
        )
    return Header(_check_tensors(path, data, size - 8 - length), metadata)


def _check_tensors(path: Path, data: dict[str, Any], body: int) -> dict[str, TensorInfo]:
    tensors, spans = {}, []
    for name, entry in data.items():
        if not NAME.fullmatch(name):
            raise _refuse(path, "a tensor has an unusual name")
        try:
            dtype, shape, (begin, end) = (
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError):
            raise _refuse(path, f"the tensor {name} is described wrongly") from None
        known = isinstance(dtype, str) and dtype in ITEM_SIZE
        if (
            not known
            or len(shape) > DIMENSION_LIMIT
            or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers)
        ):
            raise _refuse(path, f"the tensor {name} has an unknown type or impossible size")
        if (0 in shape and shape != (0,)) or math.prod(shape) * ITEM_SIZE[dtype] != end - begin:
            raise _refuse(path, f"the size of the tensor {name} does not fit its data")
        tensors[name] = TensorInfo(dtype, shape)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _refuse(path, "its tensors overlap or leave gaps")
        position = end
    if position != body:
        raise _refuse(path, "it is cut off or has data that belongs to no tensor")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _what_it_is(prefix: bytes) -> str:
    if prefix.startswith(b"PK") or prefix.startswith(b"\x80"):
        return (
            "it is a pickle file, which can run code when opened; convert it to .safetensors first"
        )
    if prefix.startswith(b"GGUF"):
        return "it is a GGUF file; get the .safetensors edition of the model"
    if prefix.lstrip().startswith(b"<"):
        return "it is a web page; the download asked for a login or failed. Download it again"
    return "it is empty, cut off or of another kind"


def _refuse(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path.name} is not a usable .safetensors file: {reason}.")
