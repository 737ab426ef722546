"""The sampling process: one request per sample, and what happens if it dies or is ended."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.jobs.previews import PreviewEngine, PreviewError, cache_key, preview_base
from tests.browser.conftest import wait_for
from trainer.config import Base
from trainer.inference.request import SampleRequest, StackedAdapter

FAKE = """
import json, pathlib, sys
print("output of a library", flush=True)
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
    """The file to which the fake process writes the prompts that it receives."""
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "seen.txt"


@pytest.fixture
def engine(seen: Path) -> PreviewEngine:
    def launch(arguments: list[str], directory: Path) -> subprocess.Popen:
        assert arguments == ["sample", "--serve"]
        return subprocess.Popen(
            [sys.executable, "-c", FAKE, str(seen)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    engine = PreviewEngine(launch)
    yield engine
    engine.end()


def request(prompt: str, **changes) -> SampleRequest:
    return SampleRequest(prompt=prompt, **changes)


def test_a_repeated_request_is_answered_from_the_cache(engine: PreviewEngine, seen: Path) -> None:
    first = engine.draw(request("a cat"))
    assert first.read_bytes() == b"png"
    assert engine.draw(request("a cat")) == first
    assert engine.draw(request("a cat", seed=2)) != first
    assert seen.read_text().splitlines() == ["a cat", "a cat"]


def test_a_changed_adapter_file_is_another_request(engine: PreviewEngine, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"1")
    with_adapter = request("a cat", adapters=[StackedAdapter(str(file), 0.8)])
    key = cache_key(with_adapter)
    assert cache_key(with_adapter) == key
    file.write_bytes(b"22")
    assert cache_key(with_adapter) != key


def test_a_target_does_not_change_the_cache_key() -> None:
    assert cache_key(request("a cat")) == cache_key(request("a cat", target="x.png"))


def test_another_base_model_resets_what_describes_the_first_one() -> None:
    base = Base(model="a/b", vae="x.safetensors", prediction="v", clip_skip=2)
    assert preview_base(base) == base
    other = preview_base(base.model_copy(update={"precision": "bf16"}), "c/d")
    assert other == Base(model="c/d", clip_skip=2)


def test_hostile_prompts_arrive_unchanged(engine: PreviewEngine, seen: Path) -> None:
    text = "x; touch PWNED $(touch PWNED) `touch PWNED` --output_dir=/tmp/x \"'"
    engine.draw(request(text))
    assert seen.read_text().strip() == text


def test_a_refused_request_raises_the_message_of_the_process(engine: PreviewEngine) -> None:
    with pytest.raises(PreviewError, match=r"^No such thing\.$"):
        engine.draw(request("refuse"))


def test_a_process_that_dies_is_started_once_more(engine: PreviewEngine, seen: Path) -> None:
    assert engine.draw(request("die once")).is_file()
    with pytest.raises(PreviewError, match="ended unexpectedly"):
        engine.draw(request("die"))
    assert seen.read_text().splitlines() == ["die once", "die once", "die", "die"]
    assert engine.draw(request("a cat")).is_file()


def test_a_request_during_which_the_engine_is_ended_is_not_repeated(
    engine: PreviewEngine, seen: Path
) -> None:
    messages = []

    def draw() -> None:
        try:
            engine.draw(request("hang"))
        except PreviewError as error:
            messages.append(str(error))

    drawing = threading.Thread(target=draw)
    drawing.start()
    wait_for(lambda: seen.exists() and "hang" in seen.read_text(), "the request", 60)
    engine.end()
    drawing.join(60)
    assert len(messages) == 1
    assert "was ended" in messages[0]
    assert not engine.is_running
    assert seen.read_text().splitlines() == ["hang"]
