"""Several persons on one page: routes, Gradio's queue and server functions separate their data."""

import base64
import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from app import accounts, security
from app.jobs import device, previews, queue
from trainer import config
from trainer.runs import run_folder, run_lock, run_requests

PEOPLE = {"anna": "secret", "boris": "other"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    from app.server import create_app

    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("people") / "outputs"
        patch.setenv("ATELIER_OUTPUTS", str(root))
        patch.setattr(security, "WRONG_PASSWORD_DELAY", 0)
        patch.setenv("GRADIO_TEMP_DIR", "")
        patch.setattr(run_folder, "current_user", run_folder.current_user)  # restored afterwards
        for name in PEOPLE:
            folder = run_folder.create(
                config.RunConfig(name=f"run of {name}"), root / "users" / name / "runs"
            )
            (folder / "x.safetensors").write_bytes(name.encode())
            dataset = root / "users" / name / "datasets" / f"set-{name}"
            dataset.mkdir(parents=True)
            Image.new("RGB", (64, 64)).save(dataset / "one.png")
        patch.setattr(queue.Launcher, "check", lambda self: None)
        with TestClient(
            create_app(PEOPLE, separate=True), base_url="http://127.0.0.1:7860"
        ) as client:
            yield client


def signed_in(name: str) -> dict[str, str]:
    return {
        "authorization": "Basic " + base64.b64encode(f"{name}:{PEOPLE[name]}".encode()).decode()
    }


def other(name: str) -> str:
    return "boris" if name == "anna" else "anna"


def run_of(name: str) -> str:
    return next((Path(run_folder.outputs_folder()) / "users" / name / "runs").iterdir()).name


@pytest.mark.parametrize("name", PEOPLE)
def test_file_routes_serve_only_the_files_of_the_person(client: TestClient, name: str) -> None:
    key = hashlib.sha256(b"one.png").hexdigest()[:24]
    assert (
        client.get(f"/runfile/{run_of(name)}/x.safetensors", headers=signed_in(name)).content
        == name.encode()
    )
    assert client.get(f"/thumb/set-{name}/{key}", headers=signed_in(name)).status_code == 200
    assert (
        client.get(
            f"/runfile/{run_of(other(name))}/x.safetensors", headers=signed_in(name)
        ).status_code
        == 404
    )
    assert client.get(f"/thumb/set-{other(name)}/{key}", headers=signed_in(name)).status_code == 404


def ask_queue(client: TestClient, name: str) -> str:
    """Returns what a page receives when it opens, and from its timer."""
    headers, received = signed_in(name), ""
    for event in client.get("/config", headers=headers).json()["dependencies"]:
        if (
            not any(target[1] in ("load", "tick") for target in event["targets"])
            or not event["backend_fn"]
        ):
            continue
        session = secrets.token_hex(8)  # another window
        call = {
            "data": [None] * len(event["inputs"]),
            "fn_index": event["id"],
            "session_hash": session,
        }
        assert client.post("/gradio_api/queue/join", json=call, headers=headers).status_code == 200
        received += client.get(
            f"/gradio_api/queue/data?session_hash={session}", headers=headers
        ).text
    return received


def test_the_page_shows_only_the_data_of_the_person(client: TestClient) -> None:
    for name in ("anna", "boris", "anna"):
        shown = ask_queue(client, name)
        assert f"run of {name}" in shown and f"set-{name}" in shown
        assert other(name) not in shown


def test_server_functions_use_the_folders_of_the_person(client: TestClient) -> None:
    for name in PEOPLE:
        headers = signed_in(name)
        components = client.get("/config", headers=headers).json()["components"]
        grid = next(c["id"] for c in components if c["props"].get("elem_id") == "dataset-view")
        answers = []
        for whose in (name, other(name)):
            call = {"component_id": grid, "session_hash": "x", "fn_name": "save_caption"}
            call["data"] = {
                "dataset": f"set-{whose}",
                "file": "one.png",
                "caption": f"written by {name}",
            }
            answers.append(
                client.post("/gradio_api/component_server", json=call, headers=headers).json()
            )
        assert answers[0]["caption"] == f"written by {name}" and "no such dataset" in json.dumps(
            answers[1]
        )


def test_a_preview_waits_for_the_training_of_another_person(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    lock = run_lock.acquire(
        run_folder.outputs_root() / "users" / "boris" / "runs" / run_of("boris")
    )
    token = accounts.user.set("anna")
    try:
        with pytest.raises(previews.PreviewError, match="busy with a training"):
            previews.check_free()
    finally:
        accounts.user.reset(token)
        lock.release()
    previews.check_free()


def test_the_oldest_queued_run_of_all_persons_is_launched_first(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    launched = []
    launcher = queue.Launcher()
    monkeypatch.setattr(queue.Launcher, "_launch", lambda self, folder: launched.append(folder))
    folders = [
        run_folder.outputs_folder() / "users" / name / "runs" / run_of(name)
        for name in ("boris", "anna")
    ]
    for folder in folders:
        run_requests.request(folder, "queued")
    CHECK(launcher)
    assert launched == [folders[0]]
    lock = run_lock.acquire(folders[1])
    CHECK(launcher)
    assert launched == [folders[0]]
    lock.release()


CHECK = queue.Launcher.check
