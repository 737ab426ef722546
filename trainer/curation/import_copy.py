"""Copies files into a dataset: chooses their names, keeps pairs together, overwrites nothing."""

import contextlib
import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from trainer.data.dataset_files import (
    MASK_ENDINGS,
    MASK_FOLDER,
    caption_path,
    is_image,
    relative,
    stem_of,
)
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.image_stats import check_image
from trainer.data.images import read_image
from trainer.data.issue import Issue, Level, printable
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

ROOM_FOR_ENDING = 20  # bytes of a name for "-123" and ".jpeg.caption"


@dataclass
class _Group:
    """The files of one stem, by their ending: an image, its captions and its mask."""

    files: dict[str, SourceFile] = field(default_factory=dict)

    @property
    def images(self) -> dict[str, SourceFile]:
        return {ending: file for ending, file in self.files.items() if ending in IMAGE_SUFFIXES}

    @property
    def masks(self) -> dict[str, SourceFile]:
        return {ending: self.files[ending] for ending in MASK_ENDINGS if ending in self.files}

    @property
    def captions(self) -> dict[str, SourceFile]:
        return {
            ending: file
            for ending, file in self.files.items()
            if ending not in IMAGE_SUFFIXES and ending not in MASK_ENDINGS
        }


class DatasetImport:
    """One import into one dataset. Adds an issue for each file that is not imported as it is."""

    def __init__(self, dataset_dir: Path, issues: list[Issue]) -> None:
        self.dataset_dir, self.issues = dataset_dir, issues
        self.taken: set[str] = set()
        """Keys of all names in the dataset."""
        self.owned: set[str] = set()
        """Keys of stems whose captions belong to an image or to this import."""
        self.by_size: defaultdict[int, list[Path]] = defaultdict(list)
        """Images that were in the dataset before, not hashed yet."""
        self.by_hash: dict[str, Path] = {}
        """The same by SHA-256, of the sizes compared so far."""
        self.saved: dict[tuple[tuple[str, ...], str], Path] = {}
        """The path in the dataset of each image, by `SourceFile.key`."""
        self._read_dataset()

    def run(self, files: Sequence[SourceFile]) -> None:
        """Copies all files."""
        for group in self._groups(files):
            self._copy_group(group)
        for file in files:
            if kind_of(file.name) == "metadata":
                self._copy_metadata(file)

    def _read_dataset(self) -> None:
        for parent, folders, files in os.walk(self.dataset_dir):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in (*files, *folders):
                path = Path(parent, name)
                self.taken.add(comparison_key(path))
                if is_image(path) and path.is_file():
                    self.by_size[path.stat().st_size].append(path)
                    stem, ending = split_name(name)
                    if ending not in MASK_ENDINGS:
                        self.owned.add(comparison_key(path.with_name(stem)))

    def _report(self, file: str, level: Level, message: str) -> None:
        self.issues.append(Issue(file, level, message))

    # Grouping

    def _groups(self, files: Iterable[SourceFile]) -> list[_Group]:
        """Returns images with their captions and masks. A repeated name starts another group."""
        files = list(files)
        images = {
            (file.folders, split_name(file.name)[0])
            for file in files
            if kind_of(file.name) == "image"
        }
        groups: dict[tuple[tuple[str, ...], str], list[_Group]] = {}
        for file in files:
            kind = kind_of(file.name)
            if kind == "other":
                self._report(file.file, "warning", why_not_imported(file.name))
            if kind not in ("image", "caption"):
                continue
            folders, (stem, ending) = file.folders, split_name(file.name)
            is_in_mask_folder = bool(folders) and folders[-1].lower() == MASK_FOLDER
            if is_in_mask_folder and ending == ".png" and (folders[:-1], stem) in images:
                # Moves masks/a.png beside its image, to stay with it if the name changes.
                folders, ending = folders[:-1], MASK_ENDINGS[0]
            same_stem = groups.setdefault((folders, stem), [])
            group = next((group for group in same_stem if ending not in group.files), None)
            if group is None:
                group = _Group()
                same_stem.append(group)
            group.files[ending] = file
        return list(itertools.chain.from_iterable(groups.values()))

    # Copying a group

    def _copy_group(self, group: _Group) -> None:
        contents: dict[str, bytes] = {}
        duplicate = self._read_images(group, contents)
        if group.images and not contents and duplicate is None:
            self._report_unpaired(group)
            return
        self._read_masks(group, contents)
        self._read_captions(group, contents)
        if not contents:
            return

        stem = self._wanted_stem(next(iter(group.files.values())))
        if duplicate is not None and not group.images.keys() & contents.keys():
            stem = stem_of(duplicate)  # new captions of an image that was there before
        elif group.images:
            stem = self._free_stem(stem, contents)
        # Captions imported after their images keep their name: another would separate them.
        self._save_all(group, contents, stem)

    def _read_images(self, group: _Group, contents: dict[str, bytes]) -> Path | None:
        """Adds the new images to `contents`. Returns the last one that the dataset had already."""
        duplicate = None
        for ending, file in group.images.items():
            try:
                data = read_image(file.path)
                check_image(data, Path(file.name))
            except DatasetError as error:
                self._report(file.file, "error", f"{error} It was not imported.")
                continue
            existing = self._existing_image(data)
            if existing is None:
                contents[ending] = data
                continue
            duplicate = existing
            message = f"Already in the dataset as {printable(existing.name)}: not copied again."
            self._report(file.file, "note", message)
            self.saved.setdefault(file.key, existing)
        return duplicate

    def _existing_image(self, data: bytes) -> Path | None:
        """Returns an identical image of the dataset. Hashes only images of the same size, once."""
        for path in self.by_size.pop(len(data), []):
            # An import may take minutes, and the user may remove files meanwhile.
            with contextlib.suppress(FileNotFoundError):
                self.by_hash[_sha256(path)] = path
        return self.by_hash.get(hashlib.sha256(data).hexdigest())

    def _report_unpaired(self, group: _Group) -> None:
        for what, files in (("caption", group.captions), ("mask", group.masks)):
            for file in files.values():
                message = f"Its image cannot be used: the {what} was not imported."
                self._report(file.file, "warning", message)

    def _read_masks(self, group: _Group, contents: dict[str, bytes]) -> None:
        for ending, file in group.masks.items():
            try:
                data = read_image(file.path)
                check_image(data, Path(file.name))
                contents[ending] = data
            except DatasetError as error:
                self._report(file.file, "warning", f"{error} The mask was not imported.")

    def _read_captions(self, group: _Group, contents: dict[str, bytes]) -> None:
        for ending, file in group.captions.items():
            try:
                data = read_image(file.path)  # the same limits apply to any file
            except DatasetError as error:
                self._report(file.file, "warning", f"{error} The caption was not imported.")
                continue
            if len(data) > MAX_CAPTION_BYTES:
                limit = f"{MAX_CAPTION_BYTES >> 20} MB"
                message = f"The caption is larger than {limit}: it was not imported."
                self._report(file.file, "warning", message)
                continue
            contents[ending] = data

    # Names

    def _wanted_stem(self, file: SourceFile) -> Path:
        folder = self.dataset_dir.joinpath(*(safe_name(part) for part in file.folders))
        return folder / safe_name(split_name(file.name)[0], MAX_NAME_BYTES - ROOM_FOR_ENDING)

    def _free_stem(self, wanted: Path, contents: Mapping[str, bytes]) -> Path:
        number, stem = 1, wanted
        while not self._is_free(stem, contents):
            number += 1
            stem = wanted.with_name(f"{wanted.name}-{number}")
        return stem

    def _is_free(self, stem: Path, contents: Mapping[str, bytes]) -> bool:
        """Returns whether the files can have this stem.

        An existing caption without an image was waiting for this image, unless its text differs.
        """
        obstacles = [
            ending
            for ending in {*contents, *CAPTION_ENDINGS}
            if comparison_key(with_ending(stem, ending)) in self.taken
        ]
        if comparison_key(stem) in self.owned:
            return not obstacles
        return all(
            ending not in contents or _contains(with_ending(stem, ending), contents[ending])
            for ending in obstacles
        )

    # Saving

    def _save_all(self, group: _Group, contents: Mapping[str, bytes], stem: Path) -> None:
        for ending, data in contents.items():
            file, target = group.files[ending], with_ending(stem, ending)
            if comparison_key(target) in self.taken:
                if not _contains(target, data):
                    message = "Another file has this name already: it was kept, this one was not."
                    self._report(file.file, "warning", message)
                continue
            if not target.parent.resolve().is_relative_to(self.dataset_dir.resolve()):
                message = "Its folder is a link that leaves the dataset: it was not imported."
                self._report(file.file, "warning", message)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, data)
            self.taken.add(comparison_key(target))
            self.owned.add(comparison_key(stem))
            self.saved.setdefault(file.key, target)
            known_stem = "/".join((*file.folders, split_name(file.name)[0]))
            if stem.relative_to(self.dataset_dir).as_posix() != known_stem:
                name = relative(target, self.dataset_dir)
                self._report(file.file, "note", f"Was saved as {name}.")

    def _copy_metadata(self, file: SourceFile) -> None:
        """Saves the captions of a `metadata.jsonl` beside the imported images."""
        captions, problem = read_metadata(file.path)
        if problem:
            self._report(file.file, "warning", problem)
        written = 0
        for name, caption in captions.items():
            *folders, file_name = composed(name).split("/")
            image = self.saved.get(((*file.folders, *folders), file_name))
            if image is None or not caption.strip():
                continue
            target = caption_path(image)
            if comparison_key(target) not in self.taken:
                atomic_write(target, caption.encode("utf-8", "replace"))
                self.taken.add(comparison_key(target))
                written += 1
        message = (
            f"{written} of its {len(captions)} captions were saved as .txt files beside the images."
        )
        self._report(file.file, "note", message)


def _contains(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
