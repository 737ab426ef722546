"""A full or read-only disk: refused before a run starts, and without loss during it."""

import errno
import os
import resource
import shutil

import pytest
from safetensors.torch import load_file

from tests.training.helpers import resumed_from
from trainer import config
from trainer.errors import DiskError
from trainer.runs import atomic_files, run_folder, run_status
from trainer.training import estimate, trainer_state
from trainer.training.runner import run_in


def set_free_bytes(monkeypatch, free):
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(
        atomic_files, "disk_usage", lambda path: disk_usage(path)._replace(free=free)
    )


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tiny_run, monkeypatch):
    set_free_bytes(monkeypatch, 1e6)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert "The disk is full: the run needs" in status.message
    assert "1.0 MB are free" in status.message
    assert status.started is None


def test_the_estimate_covers_what_a_run_writes(train_tiny, outputs):
    folder = train_tiny({"saving.saves": 6, "saving.state_every": 1})
    written = sum(path.stat().st_size for path in outputs.rglob("*") if path.is_file())
    assert written < estimate.disk_bytes(config.load(folder / "run.toml"))


def test_a_run_resumes_after_the_disk_was_full(tiny_run, monkeypatch):
    """The checkpoint that does not fit is not started, and the one before it stays."""
    uninterrupted = run_folder.create(tiny_run({"saving.precision": "fp32"}))
    assert run_in(uninterrupted) == 0
    folder = run_folder.create(tiny_run({"saving.precision": "fp32"}))
    save_checkpoint = trainer_state.save_checkpoint
    with monkeypatch.context() as patch:

        def fill_disk_at_step_4(folder, checkpoint):
            if checkpoint.step == 4:
                set_free_bytes(patch, 1000)
            save_checkpoint(folder, checkpoint)

        patch.setattr("trainer.training.saving.save_checkpoint", fill_disk_at_step_4)
        assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert "the checkpoint of step 4 needs" in status.message
    assert status.can_resume
    assert (folder / "report.txt").is_file()
    assert not list(folder.rglob(".writing-*"))

    assert resumed_from(folder) == (0, 3)
    assert run_status.read_status(folder).losses == run_status.read_status(uninterrupted).losses
    adapter = load_file(folder / "tiny.safetensors")
    assert adapter.keys() == load_file(uninterrupted / "tiny.safetensors").keys()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_old_file(tmp_path, monkeypatch, number):
    atomic_files.atomic_write(tmp_path / "a", "old")

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError, match="existing files are kept"):
        atomic_files.atomic_write(tmp_path / "a", "new")
    with (
        pytest.raises(DiskError, match="existing files are kept"),
        atomic_files.atomic_folder(tmp_path / "b") as temporary,
    ):
        (temporary / "x").write_text("x")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_real_file_size_limit_leaves_the_old_file(tmp_path):
    atomic_files.atomic_write(tmp_path / "a", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(DiskError, match="a needs 0.3 MB"):
            atomic_files.atomic_write(tmp_path / "a", bytes(2**18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_files.atomic_write(tmp_path / "missing" / "a", "new")


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path):
    with atomic_files.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(KeyError), atomic_files.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("new")
        raise KeyError
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
