"""Errors are explained with a cause and an action, and the report contains no secret."""

import errno
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.runs import error_messages, run_folder, run_status
from trainer.training.runner import run_in
from trainer.training.step import optimizer_step

TOKEN = "hf_" + "aBcD1234" * 4


class GatedRepoError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


class SafetensorError(Exception):
    pass


class UnpicklingError(Exception):
    pass


EXAMPLES = [
    (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), "Memory ran out"),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        "Memory ran out",
    ),
    (MemoryError(), "Memory ran out"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), "Memory ran out"),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "Memory ran out",
    ),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "A GPU library failed"),
    (
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        "not built for this GPU",
    ),
    (RuntimeError("Found no NVIDIA driver on your system."), "driver is missing"),
    (AssertionError("Torch not compiled with CUDA enabled"), "no CUDA support"),
    (RuntimeError("CUDA error: unspecified launch failure"), "The GPU failed"),
    (
        NotImplementedError(
            "No operator found for `memory_efficient_attention_backward` with inputs"
        ),
        "pip uninstall xformers",
    ),
    (
        RuntimeError("CUDA Setup failed despite GPU being available (libbitsandbytes_cuda117.so)"),
        "training.optimizer to adamw",
    ),
    (ValueError("Attempting to unscale FP16 gradients."), "base.precision"),
    (GatedRepoError("403 Client Error. Access to model x is restricted"), "licence"),
    (RepositoryNotFoundError("401 Client Error. Repository Not Found for url"), "no such model"),
    (
        OSError("(MaxRetryError('HTTPSConnectionPool: Network is unreachable'))"),
        "network cannot be reached",
    ),
    (RuntimeError("SSLError: CERTIFICATE_VERIFY_FAILED"), "not trusted"),
    (SafetensorError("Error while deserializing header: HeaderTooLarge"), "Download it again"),
    (UnpicklingError("invalid load key, '<'."), "pickle"),
    (
        RuntimeError("Error(s) in loading state_dict: size mismatch for conv_in.weight"),
        "do not belong together",
    ),
    (
        RuntimeError("Expected all tensors to be on the same device, but found cpu and cuda:0"),
        "do not fit each other",
    ),
    (OSError("image file is truncated (3 bytes not processed)"), "Dataset tab"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UTF-8"),
    (ImportError("DLL load failed while importing _C"), "constraints.txt"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    (
        OSError(errno.ENOSPC, "No space left on device", "a.safetensors"),
        "disk is full (No space left on device, a.safetensors)",
    ),
    (OSError(errno.EACCES, "Permission denied", "x"), "No permission"),
    (OSError(errno.EROFS, "Read-only file system", "x"), "No permission"),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "01.png"),
        "is missing (No such file or directory, 01.png)",
    ),
    (OSError(errno.EMFILE, "Too many open files"), "Too many files"),
    (OSError(errno.EIO, "Input/output error", "x"), "local disk"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "Shorten it"),
    (
        ZeroDivisionError("division by zero"),
        "inside the trainer (ZeroDivisionError: division by zero)",
    ),
    (EOFError(), "Another process ended early"),
    (ConfigError("A message of the trainer."), "A message of the trainer."),
]


@pytest.mark.parametrize(
    "error, expected",
    EXAMPLES,
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_known_error_is_explained(error, expected):
    message = error_messages.explain(error)
    assert expected in message
    assert message.endswith(".")
    assert "Traceback" not in message and "\n" not in message


def test_every_known_error_has_an_example():
    messages = [error_messages.explain(error) for error, _ in EXAMPLES]
    for known in error_messages.KNOWN_ERRORS:
        assert any(message.startswith(known.cause) for message in messages), known.cause


@pytest.mark.parametrize("known", error_messages.KNOWN_ERRORS, ids=lambda known: known.cause)
def test_each_explanation_is_a_cause_and_an_action_in_sentences(known):
    for text in (known.cause, known.action):
        assert text[0].isupper() or text.startswith("bitsandbytes")
        assert text.endswith(".")


def test_only_an_error_of_the_trainer_is_passed_on_as_it_is():
    assert error_messages.explain(ConfigError("Set it.")) == "Set it."
    assert error_messages.explain(ValueError("Set it.")).endswith(
        "the report contains the details."
    )


@pytest.mark.parametrize(
    "text",
    [
        f"token {TOKEN} refused",
        f"https://anna:{TOKEN}@huggingface.co/x",
        f"Authorization: Bearer {TOKEN}",
        "password=hunter22",
    ],
)
def test_secrets_are_removed(text):
    shown = error_messages.redacted(text)
    assert not any(secret in shown for secret in (TOKEN, "hunter22", "anna"))


def test_user_names_in_paths_and_secrets_of_the_environment_are_removed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "any-odd-secret")
    text = f"{Path.home()}/models any-odd-secret /home/anna/x C:\\Users\\Anna\\x /Users/anna/y"
    shown = error_messages.redacted(text)
    assert not any(secret in shown for secret in ("any-odd-secret", str(Path.home()), "nna"))
    assert "~/models" in shown


def test_a_failed_run_leaves_a_report_without_secrets(tiny_run, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError(f"CUDA error: no kernel image is available ({TOKEN}) in {Path.home()}/x")

    monkeypatch.setattr(optimizer_step, "microbatch_losses", fail)
    folder = run_folder.create(tiny_run())
    (folder / "log.txt").write_text(f"line of the log with {TOKEN}\n" * 500)
    assert run_in(folder) == 1
    printed = capsys.readouterr().err
    assert "not built for this GPU" in run_status.read_status(folder).message
    assert "not built for this GPU" in printed

    report = (folder / "report.txt").read_text()
    for part in (
        "not built for this GPU",
        "Traceback",
        "no kernel image",
        "torch 2.",
        "[training]",
    ):
        assert part in report
    assert report.count("line of the log") == error_messages.LOG_LINES
    assert f"{Path.home()}/x" not in report
    assert TOKEN not in report + printed + (folder / "events.jsonl").read_text()
