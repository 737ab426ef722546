"""Downloads with the real client from a small server on this machine, without network."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainer.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "someone/half": {
        "model_index.json": b"{}",
        "README.md": b"hello",
        "setup.py": b"open('PWNED', 'w')",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"u" * 3_000_000,
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "vae/diffusion_pytorch_model.safetensors": b"v" * 1_000_000,
        "vae/diffusion_pytorch_model.fp16.safetensors": b"w" * 1000,
    },
    "someone/single": {"model.safetensors": b"x", "README.md": b"hello"},
}
DOWNLOAD = """
import json, sys
from trainer.errors import ModelError
from trainer.models import hub
events = []
try:
    folder = hub.download(sys.argv[1], sys.argv[2], hub.MODEL_FILES, events.append)
    print(json.dumps({"folder": str(folder), "events": [vars(event) for event in events]}))
except ModelError as error:
    print(json.dumps({"error": str(error)}))
"""

LOCATE = """
import sys
from trainer import config
from trainer.models import model_files
print(model_files.locate(config.Base(model=sys.argv[1])))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers the client's requests from REPOSITORIES."""

    requests: list[tuple[str, str]] = []
    """(path, Authorization header) of every request."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.partition("?")[0].strip("/")
        self.requests.append((path, self.headers.get("Authorization", "")))
        api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        files = REPOSITORIES.get(f"{owner}/{name}")
        if owner == "gated":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if rest and rest[1] not in ("main", "v2", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if api:
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(info).encode(), {}, body)
        content = files["/".join(rest[2:])]
        headers = {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": COMMIT}
        return self._send(200, content, headers, body)

    def _send(self, status, content, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def environment(tmp_path):
    """Returns environment variables of a process that uses the server above as the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.requests = []
    yield os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret",
    }
    server.shutdown()


@pytest.fixture
def download(environment):
    """Downloads in another process, because the client reads its settings only once."""

    def run(model, revision="", **changes):
        done = subprocess.run(
            [sys.executable, "-c", DOWNLOAD, model, revision],
            env=environment | changes,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "hf_secret" not in done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_model_is_downloaded_with_progress_and_found_again_offline(download, tmp_path):
    """Takes the fp16 edition if there is no other, no code and no pickles, and sends the token."""
    result = download("someone/half")
    folder = Path(result["folder"])
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    unet = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    assert unet.read_bytes() == b"u" * 3_000_000
    progress = [(event["phase"], event["done"], event["total"]) for event in result["events"]]
    assert progress[-1] == ("downloading", 4, 4)
    assert progress == sorted(progress) and len(set(progress)) >= 3
    assert {token for _, token in Hub.requests} == {"Bearer hf_secret"}
    assert Hub.requests[-1][0].endswith("model_index.json")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    located = subprocess.run(
        [sys.executable, "-c", LOCATE, "someone/half"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert located.stdout.strip() == str(folder), located.stderr


@pytest.mark.parametrize(
    "model, revision, changes, words",
    [
        ("someone/nothing", "", {}, "there is no such model, or it is private"),
        ("gated/model", "", {}, "requires you to accept its terms"),
        ("someone/half", "v9", {}, "it has no revision v9"),
        (
            "someone/single",
            "",
            {},
            "has no model_index.json.*download model.safetensors by hand and give its path",
        ),
        (
            "someone/half",
            "",
            {"HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE is set, so nothing is downloaded",
        ),
        (
            "someone/half",
            "",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "not on this machine and could not be downloaded",
        ),
    ],
)
def test_a_failed_download_gives_its_reason(download, model, revision, changes, words):
    error = download(model, revision, **changes)["error"]
    assert re.search(words, error) and error.endswith(".") and "http" not in error


def test_an_fp16_edition_is_taken_only_if_there_is_no_other():
    full = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    half = [f"unet/diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert hub.wanted_files(full + half) == full
    assert hub.wanted_files(half) == half


def test_other_folders_non_ema_weights_and_code_are_never_downloaded():
    other = ["unet/a.non_ema.safetensors", "x/y.safetensors", "unet/sub/z.safetensors", "pipe.py"]
    assert hub.wanted_files(other) == []


FIND = """
import json, sys
from trainer import config
from trainer.families import find_files
events = []
base = config.Base(model=sys.argv[1], vae="someone/vae")
first = find_files(base, events.append).weights["vae"]
second = find_files(base, events.append).weights["vae"]
print(json.dumps({
    "first": [str(path) for path in first],
    "second": [str(path) for path in second],
    "phases": [event.phase for event in events],
}))
"""


def test_a_replacement_vae_is_downloaded_once(environment, tiny_base, monkeypatch):
    """Only its configuration and weights are downloaded, and the second time it is cached."""
    own = {path.name: path.read_bytes() for path in (tiny_base / "vae").iterdir()}
    monkeypatch.setitem(
        REPOSITORIES,
        "someone/vae",
        own | {"README.md": b"hello", "diffusion_pytorch_model.bin": b"pickle"},
    )
    done = subprocess.run(
        [sys.executable, "-c", FIND, str(tiny_base)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["first"] == found["second"] and len(found["first"]) == 1
    folder = Path(found["first"][0]).parent
    assert folder != tiny_base / "vae"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == own
    assert set(found["phases"]) == {"downloading"}
    api_requests = [path for path, _ in Hub.requests if path.startswith("api/")]
    assert len(api_requests) == 1
