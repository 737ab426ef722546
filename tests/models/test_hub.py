"""Downloads from a small hub of our own on this machine: the real client, the real protocol, no network."""

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
ASK = """
import json, sys
from trainer import hub
from trainer.errors import ModelError
events = []
try:
    folder = hub.download(sys.argv[1], sys.argv[2], hub.MODEL_FILES, events.append)
    print(json.dumps({"folder": str(folder), "events": [vars(event) for event in events]}))
except ModelError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    seen: list[tuple[str, str]] = []

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.partition("?")[0].strip("/")
        self.seen.append((path, self.headers.get("Authorization", "")))
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
            listed = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            return self._send(
                200,
                json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": listed}).encode(),
                {},
                body,
            )
        content = files["/".join(rest[2:])]
        return self._send(
            200, content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": COMMIT}, body
        )

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
    """Of a process whose hub is the one below."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.seen = []
    yield os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret",
    }
    server.shutdown()


@pytest.fixture
def ask(environment):
    """Downloads in a process of its own, since the client reads its settings once."""

    def run(model, revision="", **changes):
        done = subprocess.run(
            [sys.executable, "-c", ASK, model, revision],
            env=environment | changes,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "hf_secret" not in done.stdout + done.stderr, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_model_is_downloaded_with_progress_and_found_again_offline(ask, tmp_path):
    """The fp16 edition where there is no other; no code, no pickle; the token from the environment; then from the cache alone."""
    told = ask("someone/half")
    folder = Path(told["folder"])
    got = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert got == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert (
        folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    ).read_bytes() == b"u" * 3_000_000
    places = [(event["phase"], event["done"], event["total"]) for event in told["events"]]
    assert (
        places[-1] == ("downloading", 4, 4) and places == sorted(places) and len(set(places)) >= 3
    )
    assert all(token == "Bearer hf_secret" for path, token in Hub.seen) and Hub.seen[-1][
        0
    ].endswith("model_index.json")
    find = "from trainer import base_model, config; print(base_model.locate(config.Base(model='someone/half')))"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    assert subprocess.run(
        [sys.executable, "-c", find], env=environment, capture_output=True, text=True
    ).stdout.strip() == str(folder)


@pytest.mark.parametrize(
    "model, revision, changes, words",
    [
        ("someone/nothing", "", {}, "there is no such model, or it is private"),
        ("gated/model", "", {}, "wants its terms accepted first"),
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
            "HF_HUB_OFFLINE is set, so nothing is fetched",
        ),
        (
            "someone/half",
            "",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "not on this machine and could not be downloaded",
        ),
    ],
)
def test_what_cannot_be_downloaded_is_said_in_a_sentence(ask, model, revision, changes, words):
    error = ask(model, revision, **changes)["error"]
    assert re.search(words, error) and error.endswith(".") and "http" not in error


def test_of_two_editions_the_plain_one_is_wanted():
    parts = [
        f"transformer/diffusion_pytorch_model{edition}-0000{n}-of-00002.safetensors"
        for edition in ("", ".fp16")
        for n in (1, 2)
    ]
    assert hub.wanted_files(parts) == parts[:2] and hub.wanted_files(parts[2:]) == parts[2:]
    assert (
        hub.wanted_files(
            [
                "unet/a.non_ema.safetensors",
                "x/y.safetensors",
                "unet/deep/er.safetensors",
                "pipeline.py",
            ]
        )
        == []
    )


FIND = """
import json, sys
from trainer import config
from trainer.families import find_files
events = []
files = [find_files(config.Base(model=sys.argv[1], vae="someone/vae"), events.append).weights["vae"] for _ in range(2)]
print(json.dumps({"vae": [[str(path) for path in paths] for paths in files], "phases": [event.phase for event in events]}))
"""


def test_another_vae_comes_from_the_hub_once(environment, tiny_base, monkeypatch):
    """Its settings and weights alone, the second time from the cache; the base's other parts stay those on the disk."""
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
    first, again = ([Path(path) for path in paths] for paths in found["vae"])
    assert first == again and len(first) == 1 and first[0].parent != tiny_base / "vae"
    assert {path.name: path.read_bytes() for path in first[0].parent.iterdir()} == own
    assert (
        set(found["phases"]) == {"downloading"}
        and len([path for path, _ in Hub.seen if path.startswith("api/")]) == 1
    )
