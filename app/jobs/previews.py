"""Samples on demand, made by one `python -m trainer sample --serve` process that keeps the model.

The process starts with the first sample. If it dies it is started once more. It ends with the page.
Samples are cached under the hash of everything that determines them, so a repeated request is free.
"""

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from app.jobs import device, runs, trainer_process
from trainer.config import Base
from trainer.errors import TrainerError
from trainer.inference.request import SampleRequest
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write

MAX_PROMPTS = 30
MAX_PROMPT_LENGTH = 2000
END_TIMEOUT = 10  # seconds
MAX_REASON_LENGTH = 300

Reply = dict[str, Any]
"""An answer of the sampling process: {"file", "seconds"} or {"error"}."""


class PreviewError(TrainerError):
    """A sample could not be made."""


def folder() -> Path:
    """Returns the folder of the samples and of the earlier prompts."""
    return run_folder.outputs_folder() / "cache" / "previews"


def preview_base(base: Base, other_model: str = "") -> Base:
    """Returns the base for samples: in the precision that suits the device now.

    With another model, the settings that describe the file of the first one do not apply.
    """
    defaults = Base()
    changes: dict[str, object] = {"precision": defaults.precision}
    if other_model and other_model != base.model:
        changes["model"] = other_model
        for name in ("revision", "vae", "prediction", "zero_terminal_snr"):
            changes[name] = getattr(defaults, name)
    return base.model_copy(update=changes)


def cache_key(request: SampleRequest) -> str:
    """Returns the name of a sample in the cache: a hash of the request and its adapter files."""
    files = [Path(adapter.file).stat() for adapter in request.adapters]
    versions = [(file.st_size, file.st_mtime_ns) for file in files]
    content = replace(request, target="").to_json() + json.dumps(versions)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def check_free() -> None:
    """Raises PreviewError while a training uses the GPU: two models would not fit."""
    if device.has_cuda() and runs.anyone_trains():
        raise PreviewError(
            "The GPU is busy with a training. Pause does not free its memory: "
            "wait for the end, or stop and save first."
        )


def prompts() -> list[str]:
    """Returns the earlier prompts, the latest first."""
    try:
        content = json.loads((folder() / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(content, list):
        return []
    return [text for text in content if isinstance(text, str)]


def keep_prompt(text: str) -> None:
    """Adds a prompt to the earlier prompts, or moves it to the top."""
    text = text.strip()[:MAX_PROMPT_LENGTH]
    earlier = prompts()
    if not text or earlier[:1] == [text]:
        return
    latest = [text, *(other for other in earlier if other != text)][:MAX_PROMPTS]
    folder().mkdir(parents=True, exist_ok=True)
    atomic_write(folder() / "prompts.json", json.dumps(latest))


Launch = Callable[[list[str], Path], "subprocess.Popen[bytes]"]


class PreviewEngine:
    """The sampling process. Threads may share an engine: it makes one sample at a time."""

    def __init__(self, launch: Launch | None = None):
        """`launch` starts the process with pipes, given its arguments and its working directory."""
        self._launch = launch or _launch
        self._process: subprocess.Popen[bytes] | None = None
        self._endings = 0
        self._lock = threading.Lock()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def draw(self, request: SampleRequest) -> Path:
        """Makes a sample, which takes seconds, or finds it in the cache. Returns its file.

        The target of the request is not used. Raises PreviewError, with the message of the process
        if the process refused the request.
        """
        target = folder() / f"{cache_key(request)}.png"
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        line = replace(request, target=str(target)).to_json() + "\n"
        with self._lock:
            endings = self._endings
            reply = self._send(line)
            # A process that died may have been killed, so it gets a second chance.
            if reply is None and endings == self._endings:
                reply = self._send(line)
        if reply is None and endings != self._endings:
            raise PreviewError(
                "The preview was ended, because a training starts on the device or the page closes."
            )
        if reply is None:
            message = (
                "The preview engine ended unexpectedly, often because memory ran out. "
                f"{self._last_log_line()}"
            )
            raise PreviewError(message.strip())
        if "error" in reply:
            raise PreviewError(str(reply["error"]))
        return target

    def end(self) -> None:
        """Ends the process, which frees its memory. The next sample starts it again."""
        self._endings += 1
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _send(self, line: str) -> Reply | None:
        """Returns the reply of the process, or None if the process died."""
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
        if reply is None:
            # It may have closed its output only. It must be gone before another one is started.
            process.kill()
            process.wait()
            self._process = None
        return reply

    def _last_log_line(self) -> str:
        log = folder() / "engine.log"
        if not log.is_file():
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:MAX_REASON_LENGTH] if lines else ""


def _read_reply(lines: IO[bytes]) -> Reply | None:
    """Returns the next line that is a reply, or None if the output ends.

    Libraries print other lines in between.
    """
    for line in lines:
        try:
            reply = json.loads(line)
        except ValueError:
            continue
        if isinstance(reply, dict):
            return reply
    return None


def _launch(arguments: list[str], directory: Path) -> "subprocess.Popen[bytes]":
    with open(directory / "engine.log", "wb") as log:
        return trainer_process.start(
            arguments, directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
