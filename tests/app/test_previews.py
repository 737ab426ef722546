"""The preview engine's child process: asked once per picture, started again when it dies, quiet when it is ended."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.jobs.previews import Adapter, PreviewEngine, PreviewError, PreviewRequest

FAKE = """
import json, pathlib, sys
print("chatter of a library", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    seen = pathlib.Path(sys.argv[1])
    with seen.open("a") as file: file.write(request["prompt"] + "\\n")
    match request["prompt"]:
        case "die": sys.exit(3)
        case "die once" if seen.read_text().count("die once") == 1: sys.exit(3)
        case "hang": continue
        case "refuse": print(json.dumps({"error": "No such thing."}), flush=True); continue
    pathlib.Path(request["target"]).write_bytes(b"png")
    print(json.dumps({"file": request["target"], "seconds": 0.1}), flush=True)
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "seen.txt"


@pytest.fixture
def engine(seen: Path) -> PreviewEngine:
    def launch(arguments: list[str], where: Path) -> subprocess.Popen:
        assert arguments == ["sample", "--serve"]
        return subprocess.Popen(
            [sys.executable, "-c", FAKE, str(seen)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    engine = PreviewEngine(launch)
    yield engine
    engine.end()


def request(prompt: str, **changes) -> PreviewRequest:
    return PreviewRequest(base={"model": "embedded", "revision": ""}, prompt=prompt, **changes)


def test_a_picture_is_drawn_once(engine: PreviewEngine, seen: Path) -> None:
    first = engine.draw(request("a cat"))
    assert first.read_bytes() == b"png" and engine.draw(request("a cat")) == first
    assert engine.draw(request("a cat", seed=2)) != first
    assert seen.read_text().splitlines() == ["a cat", "a cat"]


def test_another_save_under_the_same_name_is_another_picture(
    engine: PreviewEngine, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"1")
    with_adapter = request("a cat", adapters=[Adapter(str(file), 0.8)])
    first = with_adapter.key()
    file.write_bytes(b"22")
    assert with_adapter.key() != first


def test_hostile_prompts_arrive_as_they_are(engine: PreviewEngine, seen: Path) -> None:
    text = "x; touch PWNED $(touch PWNED) `touch PWNED` --output_dir=/tmp/x \"'"
    engine.draw(request(text))
    assert seen.read_text().strip() == text


def test_a_refusal_is_a_sentence(engine: PreviewEngine) -> None:
    with pytest.raises(PreviewError, match="No such thing"):
        engine.draw(request("refuse"))


def test_a_dead_engine_is_started_once_more(engine: PreviewEngine) -> None:
    assert engine.draw(request("die once")).is_file()
    with pytest.raises(PreviewError, match="ended unexpectedly"):
        engine.draw(request("die"))
    assert engine.draw(request("a cat")).is_file()


def test_an_ended_engine_stays_ended(
    engine: PreviewEngine, seen: Path, wait_until: Callable
) -> None:
    said = []

    def draw() -> None:
        try:
            engine.draw(request("hang"))
        except PreviewError as error:
            said.append(str(error))

    waiting = threading.Thread(target=draw)
    waiting.start()
    wait_until(lambda: seen.exists() and "hang" in seen.read_text())
    engine.end()
    waiting.join(60)
    assert said and "was ended" in said[0] and not engine.is_running


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(600):
            if condition():
                return
            threading.Event().wait(0.1)
        raise AssertionError("waited in vain")

    return wait
