"""Fixtures of single-file models."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ldm


@pytest.fixture(scope="session")
def single_file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from a kind, such as "sdxl", to its tiny file, which is written once."""
    written: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in written:
            path = tmp_path_factory.mktemp("ldm") / f"{kind}.safetensors"
            written[kind] = ldm.write_single_file(path, kind)
        return written[kind]

    return get
