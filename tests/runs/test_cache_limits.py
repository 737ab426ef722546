"""Cleaning up: caches above their limit, old uploads and unfinished files are deleted."""

import os
import shutil

import pytest
from safetensors.torch import load_file

from tests.training.helpers import resumed_from
from trainer.cli.main import main
from trainer.runs import cache_limits, run_folder
from trainer.runs.atomic_files import WRITING
from trainer.training.runner import run_in

NOT_CACHES = (
    "cache/removed/cats/a.png",
    "datasets/cats/a.png",
    "runs/x/run.toml",
    "cache/uploads/new.png",
    "cache/uploads/old/x.png",
)


@pytest.fixture
def cache(outputs):
    """Ten entries of 1000 bytes, "0" unused for longest, beside files that must stay."""
    for number in range(10):
        path = outputs / "cache" / ("thumbs" if number % 2 else "ab") / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (1e9 + number, 1e9 + number))
    for name in NOT_CACHES:
        (outputs / name).parent.mkdir(parents=True, exist_ok=True)
        (outputs / name).write_bytes(b"kept")
    return outputs / "cache"


def entries(cache):
    return sorted(int(path.name) for path in cache.rglob("*") if path.name.isdigit())


def test_the_least_recently_used_entries_are_deleted_first(cache):
    cache_limits.touch(cache / "ab" / "0")
    assert (cache / "ab" / "0").stat().st_mtime == 1e9, "only the time of use changes"
    assert cache_limits.size() == 10_000
    assert cache_limits.prune(5_000) == 5_000
    assert entries(cache) == [0, 6, 7, 8, 9]
    assert cache_limits.prune(5_000) == 0


def test_the_limit_comes_from_the_environment(cache, monkeypatch):
    assert cache_limits.limit() == 20e9
    monkeypatch.setenv("ATELIER_CACHE_GB", "0.000005")
    assert cache_limits.prune() == 5_000
    monkeypatch.setenv("ATELIER_CACHE_GB", "a lot")
    assert cache_limits.limit() == 20e9


def test_clearing_deletes_nothing_but_caches(cache, outputs, capsys, monkeypatch):
    monkeypatch.setenv("ATELIER_CACHE_GB", "3")
    assert main(["cache", "--clear"]) == 0
    assert "the limit is 3 GB" in capsys.readouterr().out
    files = {str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file()}
    assert files == set(NOT_CACHES)


def test_clearing_leaves_files_that_are_being_written(cache):
    young, old = (cache / "ab" / f"{WRITING}{name}" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    cache_limits.clear()
    assert young.exists()
    assert not old.exists()


def test_only_old_uploads_are_deleted(cache):
    os.utime(cache / "uploads" / "old", (1e9, 1e9))
    cache_limits.clean_uploads()
    assert [path.name for path in (cache / "uploads").iterdir()] == ["new.png"]


def test_a_link_in_the_uploads_is_deleted_and_its_target_stays(cache, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "x.png").write_bytes(b"kept")
    (cache / "uploads" / "link").symlink_to(target)
    cache_limits.clean_uploads(older_than=-1)
    assert not (cache / "uploads" / "link").is_symlink()
    assert (target / "x.png").read_bytes() == b"kept"


def test_a_run_resumes_to_identical_weights_after_the_caches_are_cleared(train_tiny, outputs):
    folder = train_tiny()
    adapter = load_file(folder / "tiny.safetensors")
    assert cache_limits.clear() > 0
    shutil.rmtree(max((folder / "state").iterdir()))
    assert resumed_from(folder)[0] == 0
    again = load_file(folder / "tiny.safetensors")
    assert all(bool((adapter[name] == again[name]).all()) for name in adapter)


def test_the_next_start_deletes_the_unfinished_files_of_a_killed_trainer(tiny_run):
    folder = run_folder.create(tiny_run())
    (folder / "state" / ".writing-x").mkdir(parents=True)
    (folder / ".writing-y").write_text("half")
    assert run_in(folder) == 0
    assert not list(folder.rglob(".writing-*"))
