"""Every row of the corpus gets its verdict, by scanning it where it lies and by importing it. See `tests/corpus.py`."""

import os
from pathlib import Path

import pytest

from tests import corpus
from trainer import config
from trainer.curation.ingest import import_files
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.issue import Issue, printable
from trainer.data.scan import scan_dataset

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # zipfile and Pillow remark on what is wrong on purpose

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


def about(findings: list[Issue], subject: Path, folder: Path) -> list[Issue]:
    """Findings naming the subject, or, where it is a caption, its picture; that a made picture is plain grey is none."""
    name = printable(subject.relative_to(folder).as_posix())
    picture = name.removesuffix(".txt") + ".png"
    findings = [
        f for f in findings if f.kind not in ("rotated", "transparent", "converted", "flat")
    ]
    return [f for f in findings if f.file in (name, picture) or f.file.endswith(f"/{name}")]


def row_folder(subject: Path, row_id: str) -> Path:
    return next(parent for parent in subject.parents if parent.name == row_id)


@pytest.mark.parametrize("row_id", SCANNED)
def test_scan_gives_the_verdict(made, row_id):
    row, subject = ROWS[row_id], path_of(made, row_id)
    folder = row_folder(subject, row_id)
    before = snapshot(folder.parent)
    (folder / "zz_control.png").write_bytes(corpus.encoded(corpus.photo(seed=99), "PNG"))
    items, findings = scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))
    (folder / "zz_control.png").unlink()

    named = about(findings, subject, folder)
    used = {item.path for item in items}
    picture = subject.with_suffix(".png") if subject.suffix == ".txt" else subject
    if row.table == "Captions" or row.verdict in (corpus.ACCEPT, corpus.REPORTED):
        assert picture in used
    elif row.verdict == corpus.SKIPPED:
        assert subject not in used
    assert bool(named) == (row.verdict != corpus.ACCEPT), named
    if row.caption is not None:
        assert next(item.caption for item in items if item.path == picture) == row.caption
    assert all(finding.file.isprintable() and finding.message.endswith(".") for finding in findings)
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize("row_id", SCANNED)
def test_import_gives_the_verdict(made, row_id, tmp_path):
    row, subject = ROWS[row_id], path_of(made, row_id)
    folder = row_folder(subject, row_id)
    before = snapshot(folder)
    findings = import_files([folder], tmp_path / "data" / "set")
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
    pictures = [path for path in kept if path.suffix in IMAGE_SUFFIXES]
    if row.verdict in (corpus.ACCEPT, corpus.REPORTED):
        items, _ = scan_dataset(tmp_path / "data" / "set", config.Dataset(resolution=64, bucket_step=8))
        assert (
            len(items)
            == len(pictures)
            == len([p for p in folder.rglob("*") if p.suffix in IMAGE_SUFFIXES])
        )
        if row.caption is not None:
            assert row.caption in {item.caption for item in items}
    elif row.table == "Images":
        assert not pictures
        assert about(findings, subject, folder) or row_id == "dir_named_png"


@pytest.mark.parametrize("row_id", ARCHIVES)
def test_archive_gets_the_verdict(made, row_id, tmp_path):
    row, subject = ROWS[row_id], path_of(made, row_id)
    before = snapshot(subject.parent)
    target = tmp_path / "data" / "set"
    findings = import_files([subject], target)
    kept = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()
    )
    if row.verdict == corpus.REFUSED:
        assert [finding.level for finding in findings] == ["error"]
        assert findings[0].message.startswith("x.zip ") and not kept
    else:
        assert {"good.png", "good.txt"} <= set(kept)
        assert bool(findings) == (row.verdict != corpus.ACCEPT), findings
        stems = {name.rpartition(".")[0] for name in kept if name.endswith(".txt")}
        assert all(f"{stem}.png" in kept for stem in stems)
    assert all(name.endswith((".png", ".txt")) for name in kept)
    assert not any(path.stat().st_mode & 0o7111 for path in target.rglob("*") if path.is_file())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert snapshot(subject.parent) == before
