"""Reads and checks the header of a .safetensors file.

The whole header is checked before any library maps the file, because a hostile one can declare
tensors that overlap, exceed the file, or take minutes to parse. The format is described at
github.com/huggingface/safetensors.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ModelError

MAX_HEADER_BYTES = 16 * 2**20  # the header of SDXL in one file has 0.4 million
MAX_TENSORS = 20_000  # SDXL in one file has 2,515
MAX_DIMENSIONS = 8  # no weight has more than 5
MAX_NUMBER = 2**48  # no size or offset is larger
ITEM_BYTES = {
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
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: str
    """As in the file: a key of ITEM_BYTES."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header of a .safetensors file."""

    tensors: dict[str, TensorInfo]
    """By name."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks a header.

    Raises ModelError with the file's name and the problem if the header or the size of the file is
    wrong.
    """
    content, body_bytes = _read_header_bytes(path)
    try:
        data = json.loads(content, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError):
        raise _refuse(path, "its header is damaged") from None
    if not isinstance(data, dict):
        raise _refuse(path, "its header is not a table of tensors")
    metadata = data.pop("__metadata__", {})
    is_text_table = isinstance(metadata, dict) and all(
        isinstance(value, str) for value in metadata.values()
    )
    if not is_text_table:
        raise _refuse(path, "its metadata is not a table of texts")
    if len(data) > MAX_TENSORS:
        raise _refuse(
            path, f"it declares {len(data):,} tensors; no model has more than {MAX_TENSORS:,}"
        )
    return Header(_check_tensors(path, data, body_bytes), metadata)


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    """Returns the JSON of the header, and the number of bytes behind it.

    A file starts with the length of the header as a little-endian 64-bit integer.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES or length + 8 > size:
                raise _refuse(path, _describe_format(prefix))
            return file.read(length), size - 8 - length
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None


def _check_tensors(path: Path, data: dict[str, Any], body_bytes: int) -> dict[str, TensorInfo]:
    """Returns the declared tensors. Raises ModelError unless they fill the body exactly."""
    tensors, spans = {}, []
    for name, entry in data.items():
        if not TENSOR_NAME.fullmatch(name):
            raise _refuse(path, "a tensor has an unusual name")
        tensors[name], span = _check_tensor(path, name, entry)
        spans.append(span)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _refuse(path, "its tensors overlap or leave gaps")
        position = end
    if position != body_bytes:
        raise _refuse(path, "it is cut off or has data that belongs to no tensor")
    return tensors


def _check_tensor(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """Returns a tensor and its first and last byte in the body, the last exclusive."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _refuse(path, f"the tensor {name} is described wrongly") from None
    has_known_type = isinstance(dtype, str) and dtype in ITEM_BYTES
    # bool is a subclass of int, so the types are compared.
    has_valid_numbers = all(
        type(number) is int and 0 <= number < MAX_NUMBER for number in (*shape, begin, end)
    )
    if not has_known_type or len(shape) > MAX_DIMENSIONS or not has_valid_numbers:
        raise _refuse(path, f"the tensor {name} has an unknown type or impossible size")
    is_empty = 0 in shape and shape != (0,)  # (0,) marks a name without data, such as "v_pred"
    if is_empty or math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise _refuse(path, f"the size of the tensor {name} does not fit its data")
    return TensorInfo(dtype, shape), (begin, end)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict. Raises ValueError if a key appears twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _describe_format(prefix: bytes) -> str:
    """Returns what a file is, judged by its first 8 bytes, and what to do about it."""
    if prefix.startswith((b"PK", b"\x80")):
        return (
            "it is a pickle file, which can run code when opened; convert it to .safetensors first"
        )
    if prefix.startswith(b"GGUF"):
        return "it is a GGUF file; download the .safetensors edition of the model"
    if prefix.lstrip().startswith(b"<"):
        return "it is a web page; the download needed a login or failed. Download it again"
    return "it is empty, cut off or of another kind"


def _refuse(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path.name} is not a usable .safetensors file: {reason}.")
