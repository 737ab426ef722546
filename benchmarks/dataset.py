"""Measures how fast a dataset of 10,000 images is scanned, shown and edited.

    python -m benchmarks.dataset [--pictures N]

Makes the images first, in a temporary folder. Prints a table: the first and the second scan of the
folder with their peak memory, the first page of the gallery with its thumbnails, and caption edits.
The result is in docs/performance.md.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (768, 512)


def make(target: tuple[str, int]) -> None:
    """Writes one JPEG of coloured clouds with grain, and its caption."""
    folder, seed = target
    random = np.random.default_rng(seed)
    clouds = Image.fromarray(random.integers(0, 255, (6, 9, 3), dtype=np.uint8)).resize(
        SIZE, Image.Resampling.BICUBIC
    )
    grain = random.integers(-12, 12, (SIZE[1], SIZE[0], 1))
    pixels = np.clip(np.asarray(clouds, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(f"{folder}/{seed:05}.jpg", quality=88)
    Path(f"{folder}/{seed:05}.txt").write_text(f"photo, cloud {seed % 50}, sky", encoding="utf-8")


def timed(name: str, action: Callable[[], object]) -> object:
    start = time.perf_counter()
    result = action()
    taken = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    duration = f"{taken:.1f} s" if taken >= 1 else f"{1000 * taken:.0f} ms"
    print(f"| {name} | {duration} | {memory:.0f} MB |", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=10_000)
    count = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as root:
        os.environ["ATELIER_OUTPUTS"] = root
        folder = Path(root) / "datasets" / "many"
        folder.mkdir(parents=True)
        with ProcessPoolExecutor() as pool:
            list(pool.map(make, ((str(folder), seed) for seed in range(count)), chunksize=100))
        measure(folder)


def measure(folder: Path) -> None:
    from app.actions import dataset_changes, dataset_images, dataset_scans, dataset_view

    # Statistics of a file are cached only if it was written longer ago than FRESH_SECONDS.
    time.sleep(3)
    settings = {"resolution": 512, "bucket_step": 64, "crop": "centre", "base": "embedded"}
    request = {"dataset": "many", "settings": settings}
    dataset_scans.PATIENCE = 36_000

    def first_page(**more: object) -> dict:
        view = dataset_view.view(request | more)
        for card in view["cards"]:
            dataset_images.thumbnail("many", card["src"].split("/")[-1].split("?")[0])
        return view

    print(
        f"\n{len(list(folder.glob('*.jpg')))} images of {SIZE[0]} x {SIZE[1]}, "
        f"{os.cpu_count()} cores\n"
    )
    print("| action | time | peak memory so far |\n|---|---|---|")
    timed("first scan, without a cache", lambda: dataset_scans.scan(request))
    timed("first page of the gallery, 60 new thumbnails", lambda: first_page(turn=True))
    timed("the same page again", lambda: first_page(turn=True))
    timed("another page", lambda: first_page(turn=True, page=70))
    timed(
        "one caption edit",
        lambda: dataset_changes.save_caption(
            request | {"file": "00050.jpg", "caption": "a red sky"}
        ),
    )
    timed(
        "the next caption edit",
        lambda: dataset_changes.save_caption(
            request | {"file": "00051.jpg", "caption": "a blue sky"}
        ),
    )
    timed("scan again after the edits", lambda: dataset_scans.scan(request))
    dataset_scans.scans.clear()
    timed("scan again, with only the cache on disk", lambda: dataset_scans.scan(request))
    words = request | {"operation": "replace", "find": "photo", "replacement": "picture"}
    timed("replace a word in all captions: preview", lambda: dataset_changes.preview_edit(words))
    timed("replace a word in all captions: apply", lambda: dataset_changes.apply_edit(words))
    timed("undo it", lambda: dataset_changes.undo(request))


if __name__ == "__main__":
    main()
