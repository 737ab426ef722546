"""Scanning and importing give each row of `tests/corpus.py` its verdict."""

import os
from pathlib import Path

import pytest

from tests import corpus
from trainer import config
from trainer.curation.ingest import import_files
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.issue import Issue, printable
from trainer.data.scan import scan_dataset

# zipfile and Pillow warn about the files that are wrong on purpose.
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = {row.id: row for row in corpus.ROWS}
SCANNED = [row.id for row in corpus.ROWS if row.table != "Archives"]
ARCHIVES = [row.id for row in corpus.ROWS if row.table == "Archives"]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return corpus.build(tmp_path_factory.mktemp("corpus"))


def path_of(made: dict[str, Path | OSError], row_id: str) -> Path:
    if isinstance(made[row_id], OSError):
        pytest.skip(str(made[row_id]))
    return made[row_id]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def issues_of(issues: list[Issue], subject: Path, folder: Path) -> list[Issue]:
    """Returns the issues of a file, and of the image if the file is a caption.

    Issues that every generated image has are left out.
    """
    name = printable(subject.relative_to(folder).as_posix())
    image = name.removesuffix(".txt") + ".png"
    expected = ("rotated", "transparent", "converted", "flat")
    issues = [issue for issue in issues if issue.kind not in expected]
    return [
        issue for issue in issues if issue.file in (name, image) or issue.file.endswith(f"/{name}")
    ]


def row_folder(subject: Path, row_id: str) -> Path:
    return next(parent for parent in subject.parents if parent.name == row_id)


@pytest.mark.parametrize("row_id", SCANNED)
def test_scan_gives_the_verdict(made, row_id):
    row, subject = ROWS[row_id], path_of(made, row_id)
    folder = row_folder(subject, row_id)
    before = snapshot(folder.parent)
    (folder / "zz_control.png").write_bytes(corpus.encoded(corpus.photo(seed=99), "PNG"))
    items, issues = scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))
    (folder / "zz_control.png").unlink()

    named = issues_of(issues, subject, folder)
    used = {item.path for item in items}
    image = subject.with_suffix(".png") if subject.suffix == ".txt" else subject
    if row.table == "Captions" or row.verdict in (corpus.ACCEPT, corpus.REPORTED):
        assert image in used
    elif row.verdict == corpus.SKIPPED:
        assert subject not in used
    assert bool(named) == (row.verdict != corpus.ACCEPT), named
    if row.caption is not None:
        assert next(item.caption for item in items if item.path == image) == row.caption
    assert all(issue.file.isprintable() and issue.message.endswith(".") for issue in issues)
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize("row_id", SCANNED)
def test_import_gives_the_verdict(made, row_id, tmp_path):
    row, subject = ROWS[row_id], path_of(made, row_id)
    folder = row_folder(subject, row_id)
    before = snapshot(folder)
    issues = import_files([folder], tmp_path / "data" / "set")
    assert snapshot(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["set"]
    kept = [path for path in (tmp_path / "data" / "set").rglob("*") if not path.is_dir()]
    assert all(
        path.suffix in (".txt", ".caption") or path.suffix in IMAGE_SUFFIXES for path in kept
    )
    assert all(
        path.is_file() and not path.is_symlink() and len(os.fsencode(path.name)) <= 120
        for path in kept
    )
    images = [path for path in kept if path.suffix in IMAGE_SUFFIXES]
    if row.verdict in (corpus.ACCEPT, corpus.REPORTED):
        items, _ = scan_dataset(
            tmp_path / "data" / "set", config.Dataset(resolution=64, bucket_step=8)
        )
        originals = [path for path in folder.rglob("*") if path.suffix in IMAGE_SUFFIXES]
        assert len(items) == len(images) == len(originals)
        if row.caption is not None:
            assert row.caption in {item.caption for item in items}
    elif row.table == "Images":
        assert not images
        assert issues_of(issues, subject, folder) or row_id == "dir_named_png"


@pytest.mark.parametrize("row_id", ARCHIVES)
def test_archive_gets_the_verdict(made, row_id, tmp_path):
    row, subject = ROWS[row_id], path_of(made, row_id)
    before = snapshot(subject.parent)
    target = tmp_path / "data" / "set"
    issues = import_files([subject], target)
    kept = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()
    )
    if row.verdict == corpus.REFUSED:
        assert [issue.level for issue in issues] == ["error"]
        assert issues[0].message.startswith("x.zip ") and not kept
    else:
        assert {"good.png", "good.txt"} <= set(kept)
        assert bool(issues) == (row.verdict != corpus.ACCEPT), issues
        stems = {name.rpartition(".")[0] for name in kept if name.endswith(".txt")}
        assert all(f"{stem}.png" in kept for stem in stems)
    assert all(name.endswith((".png", ".txt")) for name in kept)
    assert not any(path.stat().st_mode & 0o7111 for path in target.rglob("*") if path.is_file())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert snapshot(subject.parent) == before
