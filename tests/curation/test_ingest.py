"""Imports: files arrive whole, paired and with safe names, or not at all with an issue."""

import io
import json
import os
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus import JPG, PNG, encoded, photo
from trainer import config
from trainer.curation import import_copy, import_zip
from trainer.curation.import_names import safe_name
from trainer.curation.ingest import import_files
from trainer.data.captions import MAX_CAPTION_BYTES, read_caption
from trainer.data.scan import scan_dataset
from trainer.errors import TrainerError


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def put(folder, name, data):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def names(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_files_folders_and_zips_are_copied(source, tmp_path):
    put(source, "10_cat/a.png", PNG)
    put(source, "10_cat/a.txt", b"a cat")
    put(source, "single.jpg", JPG)
    with zipfile.ZipFile(source / "more.zip", "w") as archive:
        archive.writestr("sub/b.png", PNG)
        archive.writestr("sub/b.caption", "a dog")
    issues = import_files(
        [source / "10_cat", source / "single.jpg", source / "more.zip"], tmp_path / "set"
    )
    assert issues == []
    assert names(tmp_path / "set") == [
        "10_cat/a.png",
        "10_cat/a.txt",
        "single.jpg",
        "sub/b.caption",
        "sub/b.png",
    ]
    assert (tmp_path / "set" / "single.jpg").read_bytes() == JPG
    assert (source / "single.jpg").read_bytes() == JPG


def test_uploads_get_the_names_that_users_know_and_stay_paired(source, tmp_path):
    uploads = [put(source, "0001", PNG), put(source, "0002", b"a cat"), put(source, "0003", JPG)]
    known = ["Ünï.png", "Ünï.txt", "10_cat/b.jpg"]
    assert import_files(zip(uploads, known, strict=True), tmp_path / "set") == []
    assert names(tmp_path / "set") == ["10_cat/b.jpg", "Ünï.png", "Ünï.txt"]


def test_names_from_a_browser_never_leave_the_dataset(source, tmp_path):
    upload = put(source, "0001", PNG)
    for name in (
        "../../evil.png",
        "/etc/evil.png",
        "..\\..\\evil.png",
        "C:\\evil.png",
        "..",
        "/",
        "",
        "a\0b.png",
    ):
        import_files([(upload, name)], tmp_path / "in" / "set")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["set"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "source"]


def test_one_upload_can_be_imported_with_several_names(source, tmp_path):
    """Uploads are stored by content, so two equal captions may be one file."""
    words, first, second = (
        put(source, "0001", b"a photo"),
        put(source, "0002", PNG),
        put(source, "0003", JPG),
    )
    dropped = [
        (first, "10_cat/1.png"),
        (words, "10_cat/1.txt"),
        (second, "20_dog/1.png"),
        (words, "20_dog/1.txt"),
    ]
    assert import_files(dropped, tmp_path / "set") == []
    assert names(tmp_path / "set") == sorted(name for _, name in dropped)


def test_names_that_become_equal_lose_nothing(source, tmp_path):
    """Folders may differ in a forbidden character, and names at the end of a long prompt."""
    prompt = "a portrait of a woman in a red dress, standing in a field of flowers, " * 2
    known = ["a?/1", "a*/1", *(f"set/{prompt}{number:03}" for number in range(3))]
    dropped = []
    for number, name in enumerate(known):
        dropped.append((put(source, f"{number}.txt", name.encode()), f"{name}.txt"))
        dropped.append(
            (put(source, f"{number}.png", encoded(photo(seed=number), "PNG")), f"{name}.png")
        )
    import_files(dropped, tmp_path / "set")
    captions = {
        item.path.read_bytes(): item.caption
        for item in scan_dataset(tmp_path / "set", config.Dataset(resolution=64, bucket_step=8))[0]
    }
    assert captions == {
        path.with_suffix(".png").read_bytes(): name[:-4].strip() for path, name in dropped[::2]
    }


def test_captions_of_long_names_can_be_imported_later(source, tmp_path):
    prompt = "a portrait of a woman in a red dress, standing in a field of flowers, " * 2
    pictures = [
        put(source, f"{number}.png", encoded(photo(seed=number), "PNG")) for number in range(3)
    ]
    words = [put(source, f"{number}.txt", f"caption {number}".encode()) for number in range(3)]
    import_files([(path, f"{prompt}{path.name}") for path in pictures], tmp_path / "set")
    import_files([(path, f"{prompt}{path.name}") for path in reversed(words)], tmp_path / "set")
    captions = {
        item.path.read_bytes(): item.caption
        for item in scan_dataset(tmp_path / "set", config.Dataset(resolution=64, bucket_step=8))[0]
    }
    assert captions == {path.read_bytes(): f"caption {path.stem}" for path in pictures}


def test_a_folder_uploaded_file_by_file_is_imported_like_a_folder(source, tmp_path):
    deep = "/".join("abcdefghijklmnopq")
    left_out = ["set/.hidden/1.png", f"{deep}/1.png", "set/more.zip", "set/notes.md"]
    upload = put(source, "0001", PNG)
    issues = import_files(
        [(upload, name) for name in ("set/__MACOSX/1.png", "set/1.png", *left_out)], tmp_path / "in"
    )
    assert names(tmp_path / "in") == ["set/1.png"]
    assert sorted(issue.file for issue in issues) == sorted(left_out)


def test_nothing_is_overwritten_and_pairs_stay_together(source, tmp_path):
    target = tmp_path / "set"
    put(target, "a.png", encoded(photo(seed=1), "PNG"))
    put(target, "a.txt", b"old")
    issues = import_files([put(source, "A.png", PNG), put(source, "A.txt", b"new")], target)
    assert names(target) == ["A-2.png", "A-2.txt", "a.png", "a.txt"]
    assert (target / "a.txt").read_bytes() == b"old" and (target / "A-2.txt").read_bytes() == b"new"
    assert [issue.message for issue in issues] == [
        "Was saved as A-2.png.",
        "Was saved as A-2.txt.",
    ]


def test_importing_twice_adds_nothing(source, tmp_path):
    files = [put(source, "a.png", PNG), put(source, "a.txt", b"a cat")]
    import_files(files, tmp_path / "set")
    issues = import_files(files, tmp_path / "set")
    assert names(tmp_path / "set") == ["a.png", "a.txt"]
    assert [(issue.file, issue.level) for issue in issues] == [("a.png", "note")]


def test_masks_stay_with_their_images_when_names_change(source, tmp_path):
    target, mask = tmp_path / "set", encoded(photo(mode="L"), "PNG")
    put(target, "a.png", encoded(photo(seed=1), "PNG"))
    put(source, "d/a.png", PNG)
    put(source, "d/a.mask.png", mask)
    put(source, "d/b?.png", encoded(photo(seed=2), "PNG"))
    put(source, "d/masks/b?.png", mask)
    put(source, "d/bad.png", b"no image")
    put(source, "d/bad.mask.png", mask)
    files = [path for path in sorted((source / "d").rglob("*")) if path.is_file()]
    issues = import_files(
        [(path, path.relative_to(source / "d").as_posix()) for path in files], target
    )
    items, _ = scan_dataset(target, config.Dataset(resolution=64, bucket_step=8))
    assert {item.path.name: item.mask and item.mask.name for item in items} == {
        "a.png": None, "a-2.png": "a-2.mask.png", "b_.png": "b_.mask.png",
    }  # fmt: skip
    assert all(item.mask is None or item.mask.read_bytes() == mask for item in items)
    assert [issue.level for issue in issues if "bad" in issue.file] == ["error", "warning"]


def test_captions_can_be_imported_later_but_replace_none(source, tmp_path):
    target = tmp_path / "set"
    import_files(
        [put(source, "a.png", PNG), put(source, "b.png", JPG), put(source, "b.txt", b"old")], target
    )
    issues = import_files([put(source, "a.txt", b"new a"), put(source, "b.txt", b"new b")], target)
    assert (
        read_caption(target / "a.png")[0] == "new a" and read_caption(target / "b.png")[0] == "old"
    )
    assert [issue.file for issue in issues] == ["b.txt"]


def test_captions_imported_first_get_their_images(source, tmp_path):
    target = tmp_path / "set"
    import_files(
        [
            put(source, "a.txt", b"cat a"),
            put(source, "d/b.txt", b"cat b").parent,
            put(source, "c.txt", b"cat c"),
        ],
        target,
    )
    put(source, "d/b.png", JPG)  # with the same caption again
    assert import_files([put(source, "a.png", PNG), source / "d"], target) == []
    import_files(
        [put(source, "c.png", encoded(photo(seed=3), "PNG")), put(source, "c.txt", b"another")],
        target,
    )
    captions = {
        item.path.name: item.caption
        for item in scan_dataset(target, config.Dataset(resolution=64, bucket_step=8))[0]
    }
    assert captions == {"a.png": "cat a", "b.png": "cat b", "c-2.png": "another"}
    assert (target / "c.txt").read_bytes() == b"cat c", "nothing is overwritten"


def test_an_image_never_gets_the_caption_of_another(source, tmp_path):
    target = tmp_path / "set"
    import_files([put(source, "a.png", PNG), put(source, "a.txt", b"cat a")], target)
    import_files([put(source, "b.png", JPG), put(source, "b.caption", b"cat b")], target)
    other = put(source, "0001", encoded(photo(seed=3), "JPEG"))
    import_files([(other, "a.jpg"), (other, "b.jpg")], target)
    lone = put(
        source, "0002", b"cat c"
    )  # a name that only Linux allows, in the same import: not an earlier caption
    import_files(
        [(lone, "c*.txt"), (put(source, "0003", encoded(photo(seed=4), "PNG")), "c?.png")], target
    )
    captions = {
        item.path.name: item.caption
        for item in scan_dataset(target, config.Dataset(resolution=64, bucket_step=8))[0]
    }
    assert captions == {
        "a.png": "cat a",
        "b.png": "cat b",
        "a-2.jpg": "",
        "b-2.jpg": "",
        "c_-2.png": "",
    }


@pytest.mark.parametrize("first", [".txt", ".png"])
def test_composed_and_decomposed_accents_are_one_name(source, tmp_path, first):
    """The image may come from a Mac, and its caption or metadata row from elsewhere."""
    dropped = [
        (put(source, "0001", b"a cat"), "\u00e9.txt"),
        (put(source, "0002", PNG), "e\u0301.png"),
    ]
    row = put(source, "0003", b'{"file_name": "\xc3\xa0.jpg", "text": "a dog"}')
    dropped += [(put(source, "0004", JPG), "a\u0300.jpg"), (row, "metadata.jsonl")]
    import_files(sorted(dropped, key=lambda pair: not pair[1].endswith(first)), tmp_path / "set")
    captions = {
        item.path.name: item.caption
        for item in scan_dataset(tmp_path / "set", config.Dataset(resolution=64, bucket_step=8))[0]
    }
    assert captions == {"\u00e9.png": "a cat", "\u00e0.jpg": "a dog"}


def test_only_images_of_the_same_size_are_hashed(source, tmp_path, monkeypatch):
    target, read = tmp_path / "set", []
    import_files([put(source, "a.png", PNG), put(source, "b.jpg", JPG)], target)
    sha256 = import_copy._sha256
    monkeypatch.setattr(import_copy, "_sha256", lambda path: read.append(path.name) or sha256(path))
    issues = import_files(
        [put(source, "c.png", PNG), put(source, "d.png", PNG), put(source, "e.bmp", b"no image")],
        target,
    )
    assert read == ["a.png"] and [issue.file for issue in issues] == [
        "c.png",
        "d.png",
        "e.bmp",
    ]


def test_a_known_image_with_another_name_gets_the_new_caption(source, tmp_path):
    target = tmp_path / "set"
    import_files([put(source, "a.png", PNG)], target)
    import_files([put(source, "other.png", PNG), put(source, "other.txt", b"a cat")], target)
    assert names(target) == ["a.png", "a.txt"]


def test_metadata_follows_renamed_images(source, tmp_path):
    put(tmp_path / "set", "data/a.png", encoded(photo(seed=1), "PNG"))
    folder = source / "data"
    put(folder, "a.png", PNG)
    put(folder, "sub/b.png", JPG)
    put(folder, "c.jpg", JPG + b"c")
    put(folder, "c.txt", b"from txt")
    captions = {"a.png": "one", "sub/b.png": "two", "c.jpg": "no"}
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    put(folder, "metadata.jsonl", "\n".join(rows).encode())
    issues = import_files([folder], tmp_path / "set")
    captions = {
        item.path.name: item.caption
        for item in scan_dataset(tmp_path / "set", config.Dataset(resolution=64, bucket_step=8))[0]
    }
    assert captions == {"a.png": "", "a-2.png": "one", "b.png": "two", "c.jpg": "from txt"}
    assert "2 of its 3 captions" in issues[-1].message


def test_files_that_are_not_imported_are_reported(source, tmp_path):
    for name in (
        "x.py",
        "x.pth",
        "x.pt",
        "x.so",
        "x.html",
        "x.svg",
        "x.zip",
        "broken.png",
        "noext",
    ):
        put(source, f"d/{name}", b"\x80payload")
    put(source, "d/broken.txt", b"a cat")
    put(source, "d/huge.txt", b"x" * (MAX_CAPTION_BYTES + 1))
    issues = import_files([source / "d", source / "gone.png"], tmp_path / "set")
    assert names(tmp_path / "set") == []
    left = {f"d/{path.name}" for path in (source / "d").iterdir()}
    assert {issue.file for issue in issues} == left | {"gone.png"}


def test_links_are_not_followed(source, tmp_path):
    secret = put(tmp_path, "secret.txt", b"secret")
    put(source, "d/a.png", PNG)
    (source / "d" / "a.txt").symlink_to(secret)
    (source / "d" / "loop").symlink_to(source)
    (source / "top.txt").symlink_to(secret)
    issues = import_files([source / "d", source / "top.txt"], tmp_path / "set")
    assert names(tmp_path / "set") == ["d/a.png"]
    assert [issue.file for issue in issues] == ["d/a.txt", "d/loop", "top.txt"]


def test_a_link_inside_the_dataset_is_not_written_through(source, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "d").symlink_to(tmp_path / "outside")
    issues = import_files([put(source, "d/a.png", PNG).parent], tmp_path / "set")
    assert not any((tmp_path / "outside").iterdir())
    assert "leaves the dataset" in issues[0].message


def test_zip_limits_apply_to_unpacked_bytes(source, tmp_path, monkeypatch):
    with zipfile.ZipFile(source / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.txt", bytes(1000))
    for limit, value in (("MAX_ENTRIES", 4), ("MAX_TOTAL_BYTES", 4000), ("MAX_FILE_BYTES", 999)):
        with monkeypatch.context() as patch:
            patch.setattr(import_zip, limit, value)
            issues = import_files([source / "x.zip"], tmp_path / limit)
        assert [issue.level for issue in issues] == ["error"] and not names(tmp_path / limit), limit


def test_zip_names_in_utf8_without_the_flag(source, tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("żółć.png", PNG)
    data = bytearray(file.getvalue())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + offset + 1] &= ~0x08
    assert import_files([put(source, "x.zip", bytes(data))], tmp_path / "set") == []
    assert names(tmp_path / "set") == ["żółć.png"]


def test_a_full_disk_is_one_error_and_leaves_no_partial_file(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TrainerError, match="No space left"):
        import_files([put(source, "a.png", PNG)], tmp_path / "set")
    assert names(tmp_path / "set") == []


def test_a_damaged_zip_does_not_stop_the_rest(source, tmp_path):
    issues = import_files(
        [put(source, "bad.zip", b"PK\3\4"), put(source, "a.png", PNG)], tmp_path / "set"
    )
    assert names(tmp_path / "set") == ["a.png"]
    assert [(issue.file, issue.level) for issue in issues] == [("bad.zip", "error")]


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=300), st.integers(20, 120))
def test_safe_names_are_safe(stem, room):
    name = safe_name(stem, room)
    assert 0 < len(name.encode("utf-8")) <= room
    assert name == name.strip(". ") and not name.startswith(("-", "~", "."))
    assert not set(name) & set('<>:"/\\|?*\0\n\r\t\x1b')
    assert safe_name(name, room) == name


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("cat 😀", "cat 😀"),
        ("-rf", "_-rf"),
        ("CON", "_CON"),
        ("con.x", "_con.x"),
        ("...", "picture"),
        ("a\nb", "ab"),
    ],
)
def test_known_safe_names(stem, expected):
    assert safe_name(stem) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_dropped_pipe_does_not_hang(source, tmp_path):
    for name in ("x.zip", "x.png", "x.txt"):
        os.mkfifo(source / name)
    issues = import_files(sorted(source.iterdir()), tmp_path / "set")
    assert names(tmp_path / "set") == [] and len(issues) == 3
