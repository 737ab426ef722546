"""Copying imported files into a dataset: under which names, and without overwriting anything."""

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from trainer.curation.import_names import (
    CAPTION_ENDINGS,
    MAX_NAME_BYTES,
    SourceFile,
    comparison_key,
    composed,
    kind_of,
    safe_name,
    split_name,
    why_not_imported,
    with_ending,
)
from trainer.data.captions import MAX_CAPTION_BYTES, read_metadata
from trainer.data.dataset_files import MASK_ENDINGS, MASK_FOLDER, caption_path, relative, suffix_of
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.image_stats import check_image
from trainer.data.images import read_image
from trainer.data.issues import Issue, Level, shown
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


class DatasetImport:
    """One import into one folder: what is there, what has been taken, what is said."""

    def __init__(self, dataset_dir: Path, findings: list[Issue]):
        self.dataset_dir, self.findings = dataset_dir, findings
        self.taken: set[str] = set()
        self.used: set[str] = (
            set()
        )  # stems of pictures, and of all that this import saves: their captions are theirs
        self.of_size: defaultdict[int, list[Path]] = defaultdict(
            list
        )  # pictures that were there before
        self.already: dict[str, Path] = {}  # the same by sha256, of the sizes that were asked for
        for parent, folders, files in os.walk(dataset_dir):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(parent, name) for name in (*files, *folders)):
                self.taken.add(comparison_key(path))
                stem, ending = split_name(path.name)
                if suffix_of(path.name) in IMAGE_SUFFIXES and path.is_file():
                    self.of_size[path.stat().st_size].append(path)
                    if ending not in MASK_ENDINGS:
                        self.used.add(comparison_key(path.with_name(stem)))

    def say(self, file: str, level: Level, message: str) -> None:
        self.findings.append(Issue(file, level, message))

    def place(self, dropped: list[SourceFile]) -> None:
        saved: dict[tuple[tuple[str, ...], str], Path] = {}
        for group in self._groups(dropped):
            self._place_group(group, saved)
        for entry in dropped:
            if kind_of(entry.name) == "metadata":
                self._place_metadata(entry, saved)

    def _groups(self, dropped: list[SourceFile]) -> list[dict[str, SourceFile]]:
        """Pictures with their captions, ending -> file. A name that comes a second time begins a group of its own."""
        groups: dict[tuple[tuple[str, ...], str], list[dict[str, SourceFile]]] = {}
        beside = {
            (entry.folders, split_name(entry.name)[0])
            for entry in dropped
            if kind_of(entry.name) == "picture"
        }
        for entry in dropped:
            if kind_of(entry.name) == "other":
                self.say(entry.shown, "warning", why_not_imported(entry.name))
            if kind_of(entry.name) not in ("picture", "caption"):
                continue
            folders, (stem, ending) = entry.folders, split_name(entry.name)
            if (
                folders
                and folders[-1].lower() == MASK_FOLDER
                and ending == ".png"
                and (folders[:-1], stem) in beside
            ):
                folders, ending = (
                    folders[:-1],
                    MASK_ENDINGS[0],
                )  # masks/a.png: beside its picture it stays with it under any name
            same_stem = groups.setdefault((folders, stem), [])
            free = next((group for group in same_stem if ending not in group), None)
            if free is None:
                same_stem.append(free := {})
            free[ending] = entry
        return [group for same_stem in groups.values() for group in same_stem]

    def _place_group(
        self, group: dict[str, SourceFile], saved: dict[tuple[tuple[str, ...], str], Path]
    ) -> None:
        pictures = {ending: entry for ending, entry in group.items() if ending in IMAGE_SUFFIXES}
        contents: dict[str, bytes] = {}
        stem = None
        for ending, entry in pictures.items():
            try:
                data = read_image(entry.path)
                check_image(data, Path(entry.name))
            except DatasetError as error:
                self.say(entry.shown, "error", f"{error} It was not imported.")
                continue
            if twin := self._twin(data):
                self.say(
                    entry.shown,
                    "note",
                    f"Is already there as {shown(twin.name)}: it was not copied again.",
                )
                stem = caption_path(twin).with_suffix("")
                saved.setdefault((entry.folders, entry.name), twin)
            else:
                contents[ending] = data
        captions = {
            ending: entry for ending, entry in group.items() if ending not in IMAGE_SUFFIXES
        }
        masks = {ending: captions.pop(ending) for ending in MASK_ENDINGS if ending in captions}
        if pictures and not contents and stem is None:
            for what, companions in (("caption", captions), ("mask", masks)):
                for entry in companions.values():
                    self.say(
                        entry.shown,
                        "warning",
                        f"Its picture cannot be used: the {what} was not imported.",
                    )
            return
        for ending, entry in masks.items():
            try:
                contents[ending] = read_image(entry.path)
                check_image(contents[ending], Path(entry.name))
            except DatasetError as error:
                contents.pop(ending, None)
                self.say(entry.shown, "warning", f"{error} The mask was not imported.")
        for ending, entry in captions.items():
            if (text := self._caption_bytes(entry)) is not None:
                contents[ending] = text
        if not contents:
            return
        wanted = self._wanted(next(iter(group.values())))
        stem = (
            self._free_stem(wanted, contents)
            if stem is None or pictures.keys() & contents.keys()
            else stem
        )
        if not pictures:  # captions dropped after their pictures: another name would part them
            stem = wanted
        self._save_all(group, contents, stem, saved)

    def _twin(self, data: bytes) -> Path | None:
        """The same picture, where it was there before. Only those of its size are read, once."""
        for path in self.of_size.pop(len(data), []):
            with contextlib.suppress(
                FileNotFoundError
            ):  # an import may take minutes, and the person may tidy up meanwhile
                self.already[_sha256(path)] = path
        return self.already.get(hashlib.sha256(data).hexdigest())

    def _save_all(
        self, group: dict[str, SourceFile], contents: dict[str, bytes], stem: Path, saved: dict
    ) -> None:
        for ending, data in contents.items():
            entry, target = group[ending], with_ending(stem, ending)
            if comparison_key(target) in self.taken:
                if not _holds(target, data):
                    message = (
                        "There is another file of that name already: it was kept, this one was not."
                    )
                    self.say(entry.shown, "warning", message)
                continue
            if not target.parent.resolve().is_relative_to(self.dataset_dir.resolve()):
                self.say(
                    entry.shown,
                    "warning",
                    "Its folder is a link that leaves the dataset: it was not imported.",
                )
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, data)
            self.taken.add(comparison_key(target))
            self.used.add(comparison_key(stem))
            saved.setdefault((entry.folders, entry.name), target)
            if stem.relative_to(self.dataset_dir).as_posix() != "/".join(
                (*entry.folders, split_name(entry.name)[0])
            ):
                self.say(entry.shown, "note", f"Was saved as {relative(target, self.dataset_dir)}.")

    def _caption_bytes(self, entry: SourceFile) -> bytes | None:
        try:
            data = read_image(entry.path)
        except DatasetError as error:
            self.say(entry.shown, "warning", f"{error} The caption was not imported.")
            return None
        if len(data) > MAX_CAPTION_BYTES:
            self.say(
                entry.shown,
                "warning",
                f"The caption is larger than {MAX_CAPTION_BYTES >> 20} MB: it was not imported.",
            )
            return None
        return data

    def _wanted(self, entry: SourceFile) -> Path:
        folder = self.dataset_dir.joinpath(*(safe_name(part) for part in entry.folders))
        return folder / safe_name(
            split_name(entry.name)[0], MAX_NAME_BYTES - 20
        )  # room for "-123" and ".jpeg.caption"

    def _free_stem(self, wanted: Path, contents: Mapping[str, bytes]) -> Path:
        number, stem = 1, wanted
        while not self._is_free(stem, contents):
            number += 1
            stem = wanted.with_name(f"{wanted.name}-{number}")
        return stem

    def _is_free(self, stem: Path, contents: Mapping[str, bytes]) -> bool:
        """Whether nothing is in the way there. A caption from before that no picture has was waiting for this one."""
        in_the_way = [
            ending
            for ending in {*contents, *CAPTION_ENDINGS}
            if comparison_key(with_ending(stem, ending)) in self.taken
        ]
        if comparison_key(stem) in self.used:
            return not in_the_way
        return all(
            ending not in contents or _holds(with_ending(stem, ending), contents[ending])
            for ending in in_the_way
        )

    def _place_metadata(
        self, entry: SourceFile, saved: dict[tuple[tuple[str, ...], str], Path]
    ) -> None:
        captions, bad = read_metadata(entry.path)
        if bad:
            self.say(entry.shown, "warning", bad)
        written = 0
        for name, caption in captions.items():
            *folders, file_name = composed(name).split("/")
            picture = saved.get(((*entry.folders, *folders), file_name))
            if picture is None or not caption.strip():
                continue
            target = caption_path(picture)
            if comparison_key(target) not in self.taken:
                atomic_write(target, caption.encode("utf-8", "replace"))
                self.taken.add(comparison_key(target))
                written += 1
        self.say(
            entry.shown,
            "note",
            f"{written} of its {len(captions)} captions were saved as .txt files beside the pictures.",
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
