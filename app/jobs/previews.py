"""Pictures on demand: one `python -m trainer sample --serve` child that keeps the model loaded between them.

It starts with the first picture, is started once more if it dies, and ends with the page. Finished pictures
are kept under the hash of everything that makes them, so that asking twice costs nothing.
"""

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from app.jobs import device, runs
from trainer.errors import TrainerError
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write


class PreviewError(TrainerError):
    """A picture could not be drawn."""


@dataclass(frozen=True)
class Adapter:
    file: str
    strength: float
    text_strength: float | None = None
    """In the text encoders; None: the same."""


@dataclass(frozen=True)
class PreviewRequest:
    """Everything that decides a picture; the engine's request but for the file to write."""

    base: dict[str, Any]
    prompt: str
    adapters: list[Adapter] = field(default_factory=list)
    negative_prompt: str = ""
    seed: int = 1
    inference_steps: int = 20
    guidance_scale: float = 7.0
    width: int = 0
    height: int = 0
    sampler: str = "auto"
    caption_tokens: int = 75

    def key(self) -> str:
        files = [
            (Path(adapter.file).stat().st_size, Path(adapter.file).stat().st_mtime_ns)
            for adapter in self.adapters
        ]
        return hashlib.sha256(
            json.dumps([asdict(self), files], sort_keys=True).encode()
        ).hexdigest()[:32]


def check_free() -> None:
    """Raises PreviewError while a training has the GPU: two models would not fit."""
    if device.has_cuda() and runs.anyone_trains():
        raise PreviewError(
            "The GPU is busy with a training. Pause does not free its memory: wait for the end, or stop and save first."
        )


PROMPTS_KEPT = 30


def prompts() -> list[str]:
    """What was drawn before, the latest first."""
    try:
        kept = json.loads((folder() / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [text for text in kept if isinstance(text, str)] if isinstance(kept, list) else []


def keep_prompt(text: str) -> None:
    text = text.strip()[:2000]
    kept = prompts()
    if text and kept[:1] != [text]:
        folder().mkdir(parents=True, exist_ok=True)
        atomic_write(
            folder() / "prompts.json",
            json.dumps([text, *(other for other in kept if other != text)][:PROMPTS_KEPT]),
        )


def folder() -> Path:
    return run_folder.outputs_folder() / "cache" / "previews"


class PreviewEngine:
    def __init__(self, launch: Callable[[list[str], Path], subprocess.Popen] | None = None):
        self._launch = launch or _launch
        self._process: subprocess.Popen | None = None
        self._endings = 0
        self._lock = threading.Lock()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def draw(self, request: PreviewRequest) -> Path:
        """The picture's file. Takes seconds. Raises PreviewError with the engine's own sentence."""
        target = folder() / f"{request.key()}.png"
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**asdict(request), "target": str(target)}) + "\n"
        with self._lock:
            endings = self._endings
            reply = self._ask(line)
            if reply is None and endings == self._endings:
                reply = self._ask(line)  # it died; a second death is no accident
        if reply is None and endings != self._endings:
            raise PreviewError(
                "The preview was ended, since a training starts on the device or the page closes."
            )
        if reply is None:
            raise PreviewError(
                f"The preview engine ended unexpectedly, often for want of memory. {self._last_words()}".strip()
            )
        if "error" in reply:
            raise PreviewError(str(reply["error"]))
        return target

    def end(self) -> None:
        """Frees the memory; the next picture starts the engine again."""
        self._endings += 1
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask(self, line: str) -> dict | None:
        if not self.is_running:
            self._process = self._launch(["sample", "--serve"], folder())
        process = self._process
        assert process and process.stdin and process.stdout, "it is launched with pipes"
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
            reply = _read_reply(process.stdout)
        except BrokenPipeError:
            reply = None
        if (
            reply is None
        ):  # it said its last; make sure that it is gone before another takes its place
            process.kill()
            process.wait()
            self._process = None
        return reply

    def _last_words(self) -> str:
        log = folder() / "engine.log"
        lines = (
            log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if log.is_file()
            else []
        )
        return lines[-1][:300] if lines else ""


def _read_reply(lines: IO[bytes]) -> dict | None:
    """The next line that is a reply; what a library prints in between is none. None when the engine ended."""
    for line in lines:
        try:
            reply = json.loads(line)
        except ValueError:
            continue
        if isinstance(reply, dict):
            return reply
    return None


def _launch(arguments: list[str], where: Path) -> subprocess.Popen:
    with open(where / "engine.log", "wb") as log:
        return runs.trainer_process(
            arguments, where, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
