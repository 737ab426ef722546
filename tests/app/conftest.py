"""A dataset of five images, and uploads as Gradio stores them."""

import hashlib

import pytest

from tests.corpus import encoded, photo

SETTINGS = {
    "resolution": 64,
    "bucket_step": 8,
    "max_aspect": 2,
    "allow_upscale": False,
    "crop": "centre",
    "base": "embedded",
}


def png(seed: int, size=(48, 48), mode="RGB") -> bytes:
    return encoded(photo(*size, mode=mode, seed=seed), "PNG")


def ask(**data) -> dict:
    """The request that a script sends about the dataset "cats"."""
    return {"dataset": "cats", "settings": SETTINGS, **data}


@pytest.fixture
def cats(outputs):
    """The folder of a dataset: 0.png to 4.png with captions "pic, cat 0" to "pic, cat 4"."""
    folder = outputs / "datasets" / "cats"
    folder.mkdir(parents=True)
    for seed in range(5):
        (folder / f"{seed}.png").write_bytes(png(seed))
        (folder / f"{seed}.txt").write_text(f"pic, cat {seed}")
    return folder


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Stores a file as Gradio's upload route does. Returns what the script then sends."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))

    def put(data: bytes, name: str) -> dict:
        folder = tmp_path / "uploads" / hashlib.sha256(data).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name.rpartition("/")[2]
        path.write_bytes(data)
        return {"path": str(path), "name": name}

    return put
