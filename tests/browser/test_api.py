"""The client API, by running the very code of docs/api.md against a real page."""

import re
import shutil
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from app.actions import datasets

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ENDPOINTS = set(re.findall(r"^\| `(/\w+)`", PAGE, re.M))


@pytest.fixture(scope="module")
def client(server) -> Client:
    return Client(server.url, verbose=False)


def test_only_the_documented_endpoints_are_there(client: Client) -> None:
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == ENDPOINTS


def test_the_code_of_the_page_runs(server, client: Client, tmp_path: Path, monkeypatch) -> None:
    """Shortened to a few steps; everything else as it stands there."""
    (tmp_path / "pictures").symlink_to(datasets.EXAMPLES / "subject")
    monkeypatch.chdir(tmp_path)
    code = (
        re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
        .replace("http://127.0.0.1:7860", server.url)
        .replace("time.sleep(2)", "time.sleep(0.3)")
    )
    short = '"training.steps": 4, "saving.saves": 1, "sampling.inference_steps": 2'
    assert '"training.steps": 300' in code
    names: dict = {}
    exec(compile(code.replace('"training.steps": 300', short), "docs/api.md", "exec"), names)
    assert (
        names["added"]["pictures"] == 12
        and names["status"]["step"] == 4
        and len(names["status"]["losses"]) == 4
    )
    with Image.open(tmp_path / "zorbit.png") as picture:
        assert "Lora: zorbit: 0.8" in picture.text["parameters"]
    run = server.outputs / "runs" / names["run"]
    assert (tmp_path / "zorbit.safetensors").read_bytes() == (
        run / "zorbit.safetensors"
    ).read_bytes()
    shutil.rmtree(run)
    shutil.rmtree(server.outputs / "datasets" / "zorbit")


def test_what_cannot_be_done_is_a_sentence(client: Client, tmp_path: Path) -> None:
    for arguments, endpoint, sentence in (
        (("nothing",), "/status", "no such run"),
        (("../..",), "/download", "no such run"),
        (("nothing", "embedded-subject", "x", None), "/train", "no such dataset"),
        (([{"path": "/etc/passwd"}], "x"), "/upload", "did not arrive"),
    ):
        with pytest.raises(AppError, match=sentence):
            client.predict(*arguments, api_name=endpoint)
