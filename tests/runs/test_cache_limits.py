"""Disk: too little of it is said before anything is lost, and what piles up is cleared."""

import errno
import os
import resource
import shutil
import time

import pytest
from safetensors.torch import load_file

from tests.training.test_resume import resumed_from
from trainer import config
from trainer.cli.main import main
from trainer.errors import DiskError
from trainer.runs import atomic_files, cache_limits, run_folder, run_status
from trainer.runs.atomic_files import WRITING
from trainer.training import estimate, trainer_state
from trainer.training.runner import run_in


def full(monkeypatch, free):
    """A disk with so many bytes free, as far as the trainer asks."""
    real = shutil.disk_usage
    monkeypatch.setattr(atomic_files, "disk_usage", lambda path: real(path)._replace(free=free))


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tiny_run, monkeypatch):
    full(monkeypatch, 1e6)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert (
        "The disk is full: the run needs" in status.message
        and "1.0 MB are free" in status.message
        and status.started is None
    )


def test_the_estimate_covers_what_a_run_writes(train_tiny, outputs):
    folder = train_tiny({"saving.saves": 6, "saving.state_every": 1})
    written = sum(path.stat().st_size for path in outputs.rglob("*") if path.is_file())
    assert written < estimate.disk_bytes(config.load(folder / "run.toml"))


def test_the_disk_fills_up_during_the_run(tiny_run, monkeypatch):
    """The state that does not fit is not begun; what was there stays, and the run goes on once there is room."""
    whole = run_folder.create(tiny_run({"saving.precision": "fp32"}))
    assert run_in(whole) == 0
    folder = run_folder.create(tiny_run({"saving.precision": "fp32"}))
    with monkeypatch.context() as patch:
        save = trainer_state.save_checkpoint

        def filling(folder, kept):
            if kept.step == 4:
                full(patch, 1000)
            save(folder, kept)

        patch.setattr("trainer.training.saving.save_checkpoint", filling)
        assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert (
        "the checkpoint of step 4 needs" in status.message
        and status.can_resume
        and (folder / "report.txt").is_file()
    )
    assert not list(folder.rglob(".writing-*"))
    assert resumed_from(folder) == (0, 3)
    assert (
        load_file(folder / "tiny.safetensors").keys()
        == load_file(whole / "tiny.safetensors").keys()
    )
    assert run_status.read_status(folder).losses == run_status.read_status(whole).losses


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk_is_a_sentence_and_leaves_the_old_file(
    tmp_path, monkeypatch, number
):
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
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == [
        "a"
    ]


def test_a_real_limit_of_the_system_is_met_the_same_way(tmp_path):
    atomic_files.atomic_write(tmp_path / "a", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(DiskError, match="a needs 0.3 MB"):
            atomic_files.atomic_write(tmp_path / "a", bytes(2**18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def cache(outputs):
    """Ten entries of 1000 bytes, the first used longest ago, and what no clearing may touch."""
    for number in range(10):
        path = outputs / "cache" / ("thumbs" if number % 2 else "ab") / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (1e9 + number, 1e9 + number))
    for name in (
        "cache/removed/cats/a.png",
        "datasets/cats/a.png",
        "runs/x/run.toml",
        "cache/uploads/new.png",
        "cache/uploads/old/x.png",
    ):
        (outputs / name).parent.mkdir(parents=True, exist_ok=True)
        (outputs / name).write_bytes(b"kept")
    return outputs / "cache"


def left(cache):
    return sorted(int(path.name) for path in cache.rglob("*") if path.name.isdigit())


def test_what_was_not_used_for_longest_goes_first(cache):
    cache_limits.touch(cache / "ab" / "0")
    assert (cache / "ab" / "0").stat().st_mtime == 1e9
    assert cache_limits.size() == 10_000 and cache_limits.prune(5_000) == 5_000
    assert left(cache) == [0, 6, 7, 8, 9] and cache_limits.prune(5_000) == 0


def test_clearing_takes_caches_only(cache, outputs, capsys, monkeypatch):
    monkeypatch.setenv("ATELIER_CACHE_GB", "3")
    assert main(["cache", "--clear"]) == 0
    assert "the limit is 3 GB" in capsys.readouterr().out and left(cache) == []
    assert len([path for path in outputs.rglob("*") if path.is_file()]) == 5


def test_clearing_leaves_what_is_being_written(cache):
    young, old = (cache / "ab" / f"{WRITING}{name}" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    cache_limits.clear()
    assert young.exists() and not old.exists()


def test_old_uploads_go_and_young_ones_stay(cache):
    os.utime(cache / "uploads" / "old", (1e9, 1e9))
    cache_limits.clean_uploads()
    assert [path.name for path in (cache / "uploads").iterdir()] == ["new.png"]


def test_a_cleared_cache_costs_time_only(tiny_run, train_tiny, outputs):
    folder = train_tiny()
    adapter = load_file(folder / "tiny.safetensors")
    assert cache_limits.clear() > 0
    shutil.rmtree(max((folder / "state").iterdir()))
    assert resumed_from(folder)[0] == 0
    again = load_file(folder / "tiny.safetensors")
    assert all(bool((adapter[name] == again[name]).all()) for name in adapter)


def test_what_a_killed_trainer_was_writing_is_cleaned_at_the_next_start(tiny_run):
    folder = run_folder.create(tiny_run())
    (folder / "state" / ".writing-x").mkdir(parents=True)
    (folder / ".writing-y").write_text(str(time.time()))
    assert run_in(folder) == 0 and not list(folder.rglob(".writing-*"))
