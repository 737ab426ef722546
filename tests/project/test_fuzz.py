"""Readers of files from strangers raise only a TrainerError, whatever the bytes.

Each test takes a few seconds. To give each a minute:
`ATELIER_FUZZ_SECONDS=60 python -m pytest -n 0 tests/project/test_fuzz.py`.
"""

import json
import os
import struct
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from trainer import config
from trainer.data.scan import scan_dataset
from trainer.errors import ConfigError, DatasetError, ModelError
from trainer.lora.writer import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged files
SECONDS = float(os.environ.get("ATELIER_FUZZ_SECONDS", 3))
FUZZ = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=SECONDS <= 3,
)


def for_a_while(check: Callable[[], None]) -> None:
    """Tests a hundred examples. In a longer test it repeats that until the time is over."""
    end = time.monotonic() + SECONDS
    check()
    while SECONDS > 3 and time.monotonic() < end:
        check()


ADAPTER = save(
    {
        "lora_unet_a.lora_down.weight": torch.ones(2, 3),
        "lora_unet_a.lora_up.weight": torch.ones(3, 2),
    },
    {"ss_network_dim": "2"},
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=20,
)


def image(format: str) -> bytes:
    buffer = BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(buffer, format)
    return buffer.getvalue()


IMAGES = [image(format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]


@st.composite
def damaged(draw: st.DrawFn, valid_files: list[bytes]) -> bytes:
    """Draws a valid file with some bytes changed, cut off or added."""
    content = bytearray(draw(st.sampled_from(valid_files)))
    for _ in range(draw(st.integers(0, 6))):
        position = draw(st.integers(0, len(content) - 1))
        content[position] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(1, len(content)))]) + draw(st.binary(max_size=40))


NAMES = st.sampled_from(
    [
        "a.png",
        "a.jpg",
        "a.webp",
        "a.gif",
        "a.tif",
        "a.bmp",
        "a.txt",
        "a.caption",
        "metadata.jsonl",
        "3_b",
        "x.masks",
        "-rf.png",
    ]
)


def test_damaged_datasets_raise_only_dataset_errors(tmp_path_factory):
    @FUZZ
    @given(
        st.dictionaries(
            NAMES,
            damaged(IMAGES)
            | st.binary(max_size=300)
            | json_values.map(lambda v: json.dumps(v).encode()),
            min_size=1,
            max_size=4,
        )
    )
    def check(files):
        folder = tmp_path_factory.mktemp("fuzz")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            items, issues = scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))
            assert items and all(issue.file.isprintable() for issue in issues)
        except DatasetError as error:
            assert str(error).strip()
        assert {path.name for path in folder.iterdir()} == set(files)

    for_a_while(check)


def framed(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(48)


def test_damaged_adapters_raise_only_model_errors(tmp_path_factory):
    @FUZZ
    @given(
        damaged([ADAPTER])
        | st.binary(max_size=200)
        | json_values.map(framed)
        | st.dictionaries(st.text(max_size=9), json_values).map(framed)
    )
    @example(ADAPTER)
    def check(content):
        path: Path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
        path.write_bytes(content)
        try:
            assert all(
                torch.isfinite(tensor).all()
                for module in read_adapter(path).modules
                for tensor in module.tensors.values()
            )
        except ModelError as error:
            assert "fuzzed.safetensors" in str(error)

    for_a_while(check)


def test_damaged_settings_raise_only_config_errors(tmp_path_factory):
    @FUZZ
    @given(
        damaged([config.to_toml(config.RunConfig()).encode()])
        | st.binary(max_size=200)
        | st.text(max_size=200).map(str.encode),
        st.dictionaries(st.sampled_from([*dict(config.fields()), "x"]), json_values, max_size=3),
        json_values,
    )
    def check(content, changes, data):
        path: Path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
        path.write_bytes(content)
        for read in (
            lambda: config.load(path),
            lambda: config.replace(config.RunConfig(), changes),
            lambda: config.from_dict(data),
        ):
            try:
                run = read()
            except ConfigError as error:
                assert str(error).strip()
            else:
                path.write_text(config.to_toml(run), encoding="utf-8")
                assert config.load(path) == run

    for_a_while(check)
