"""Checks: what the statistics of images and captions mean for training, as one issue each.

All functions are pure and open no files. They judge a dataset by the settings of the run, so that
an issue describes what the run would do. The thresholds were chosen on the example images (see
`image_stats.blur_effect`).
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence

from trainer import config
from trainer.data import token_count
from trainer.data.buckets import Crop, share_seen
from trainer.data.captions import has_word, tags_of
from trainer.data.image_stats import ImageStats, near_duplicates
from trainer.data.issue import Issue

MAX_BLUR = 0.65
MIN_CONTRAST = 40  # of 255 greys
MAX_ENLARGEMENT = 1.05  # of a side; a little less than the resolution is not noticed
MIN_SHARE_SEEN = 0.75  # of an image's area
MIN_CAPTIONS_FOR_SHARED_TAG = 5

VERDICTS = (
    (20, "Enough for a subject or a style."),
    (10, "Enough for a subject."),
    (5, "Few: enough to try; ten or more learn better."),
    (0, "Too few to learn from: use ten or more."),
)
"""The verdict on at least so many distinct images."""

UsableImages = Sequence[tuple[str, ImageStats]]
"""The printable path and the statistics of each usable image."""


# Single images


def about_image(
    file: str, name: str, stats: ImageStats, crop: Crop, settings: config.Dataset
) -> list[Issue]:
    """Returns the issues with one image. `name` is its file name, `crop` the part that is seen."""
    issues = []
    for note in stats.notes:
        kind = "animated" if "first" in note else "odd-picture"
        issues.append(Issue(file, "note", f"The image {note}.", kind))
    for conversion in stats.conversions:
        message = f"The image {conversion.description}."
        issues.append(Issue(file, "note", message, conversion.kind))
    if any("\udc80" <= character <= "\udcff" for character in name):
        message = "The file name is not UTF-8 and is shown with escapes: rename it."
        issues.append(Issue(file, "note", message))
    issues += _about_resolution(file, stats, settings)
    issues += _about_crop(file, stats, crop, settings)
    if stats.blur > MAX_BLUR:
        message = (
            "The image looks blurred, and the adapter learns the blur too: use a sharper one, or "
            "leave it out."
        )
        issues.append(Issue(file, "warning", message, "blurred"))
    if stats.contrast < MIN_CONTRAST:
        message = (
            f"The image has little contrast ({stats.contrast} of 255), so there is little to "
            "learn: edit it, or leave it out."
        )
        issues.append(Issue(file, "note", message, "flat"))
    return issues


def _about_resolution(file: str, stats: ImageStats, settings: config.Dataset) -> list[Issue]:
    resolution = largest_resolution(settings)
    enlargement = resolution / math.sqrt(stats.width * stats.height)
    if enlargement <= MAX_ENLARGEMENT:
        return []
    if settings.allow_upscale:
        effect = f"it is upscaled {enlargement:.1f} times, which blurs it"
    else:
        effect = (
            "it is trained at its own size (dataset.allow_upscale would blur it, upscaled "
            f"{enlargement:.1f} times)"
        )
    message = (
        f"The image ({stats.width} x {stats.height}) is smaller than the resolution of "
        f"{resolution}: {effect}. Use a larger one."
    )
    return [Issue(file, "warning", message, "small")]


def _about_crop(file: str, stats: ImageStats, crop: Crop, settings: config.Dataset) -> list[Issue]:
    share = share_seen(crop)
    if share >= MIN_SHARE_SEEN:
        return []
    size = f"{stats.width} x {stats.height}"
    percent = max(1, round(100 * share))
    aspect = max(stats.width, stats.height) / min(stats.width, stats.height)
    if aspect > settings.max_aspect:
        message = (
            f"Only {percent} % of the image ({size}) is seen, because it is longer than "
            f"dataset.max_aspect = {settings.max_aspect:g} allows: crop it to the part that "
            "matters, or raise the setting."
        )
    else:
        message = (
            f"Only {percent} % of the image ({size}) is seen, because no size in steps of "
            f"dataset.bucket_step = {settings.bucket_step} has its shape: crop it to the part "
            "that matters, or lower the setting."
        )
    return [Issue(file, "warning", message, "narrow")]


def largest_resolution(settings: config.Dataset) -> int:
    """Returns the highest of the resolutions that images are trained at."""
    return max((settings.resolution, *settings.resolutions))


# All images


def about_duplicates(images: UsableImages, captioned: Collection[str]) -> list[Issue]:
    """Returns an issue for each exact or near duplicate of another image.

    Of two images it names the one without a caption, otherwise the one with the longer name, as a
    browser appends " (1)" to a copy. `captioned` holds the paths of the images with captions.
    """
    issues: list[Issue] = []
    distinct: list[tuple[str, ImageStats]] = []
    first_with: dict[str, str] = {}  # by sha256
    for file, stats in sorted(
        images, key=lambda image: (image[0] not in captioned, len(image[0]), image[0])
    ):
        original = first_with.setdefault(stats.sha256, file)
        if original == file:
            distinct.append((file, stats))
            continue
        message = f"The same image as {original}, so it counts twice: remove one."
        issues.append(Issue(file, "warning", message, "duplicate", original))
    for later, earlier in near_duplicates([stats.signature for _, stats in distinct]):
        original = distinct[earlier][0]
        message = (
            f"Nearly the same as {original}: what they share is learned twice as strongly. Remove "
            "one, unless that is intended."
        )
        issues.append(Issue(distinct[later][0], "note", message, "near-duplicate", original))
    return issues


def about_mixed_sizes(images: UsableImages, settings: config.Dataset) -> list[Issue]:
    """Returns an issue if some images, but not all, are smaller than the resolution."""
    resolution = largest_resolution(settings)
    small = [
        file
        for file, stats in images
        if stats.width * stats.height * MAX_ENLARGEMENT**2 < resolution**2
    ]
    if not small or len(small) == len(images):
        return []
    message = (
        f"{len(small)} of {len(images)} images are smaller than the resolution of {resolution}, so "
        "the adapter sees two kinds of sharpness: replace or leave out the small ones, such as "
        f"{small[0]}, or choose a lower resolution."
    )
    return [Issue("all images", "note", message, "mixed-sizes")]


# Captions


def about_captions(
    captions: Sequence[tuple[str, str]], settings: config.Dataset, count: token_count.Counter
) -> list[Issue]:
    """Returns the issues with captions, given as (printable path of the image, caption).

    The captions are as in the files, without the trigger word that training adds.
    """
    trigger, limit = settings.trigger, settings.caption_tokens
    lengths = _longest_lines([caption for _, caption in captions], count)
    issues = []
    for (file, caption), length in zip(captions, lengths, strict=True):
        if not caption:
            prompt = f"with the trigger word “{trigger}” alone" if trigger else "without a prompt"
            message = f"No caption: the image is trained {prompt}. Write one that describes it."
            issues.append(Issue(file, "warning", message, "no-caption"))
        elif length > limit:
            message = (
                f"The caption has {length} tokens, but only {limit} are read, so its end may not "
                "be seen. dataset.caption_tokens reads up to 225."
            )
            issues.append(Issue(file, "note", message, "long-caption"))
        if caption and trigger and not has_word(caption, trigger):
            message = (
                f"The caption lacks the trigger word “{trigger}”: training puts it in front, and "
                "the file stays unchanged."
            )
            issues.append(Issue(file, "note", message, "no-trigger", trigger))
    written = [caption for _, caption in captions if caption]
    return issues + _about_shared_tags(written, trigger)


def _longest_lines(captions: Sequence[str], count: token_count.Counter) -> list[int]:
    """Returns the tokens of each caption's longest line.

    A caption has several lines only with `dataset.caption_wildcards`, which reads one at a time.
    """
    owners, lines = [], []
    for number, caption in enumerate(captions):
        for line in caption.split("\n"):
            owners.append(number)
            lines.append(line)
    longest = [0] * len(captions)
    for number, length in zip(owners, count(lines), strict=True):
        longest[number] = max(longest[number], length)
    return longest


def _about_shared_tags(captions: Sequence[str], trigger: str) -> list[Issue]:
    if len(captions) < MIN_CAPTIONS_FOR_SHARED_TAG:
        return []
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(list(dict.fromkeys(tag.casefold() for tag in tags_of(caption))))
    issues = []
    for tag, number in counts.items():
        if number < len(captions) or tag == trigger.casefold():
            continue
        message = (
            f"Every caption has the tag “{tag}”: it becomes a second trigger word, and the subject "
            "appears only in prompts with it. Remove it from captions of images that show it "
            "anyway."
        )
        issues.append(Issue("all captions", "note", message, "shared-tag", tag))
    return issues


# Summary


def verdict(usable: int, issues: Sequence[Issue]) -> str:
    """Summarises a scan that found so many usable images.

    For example "22 of 24 images are usable, 20 have captions. Enough for a subject."
    """
    by_kind = Counter(issue.kind for issue in issues)
    total = usable + sum(issue.level == "error" for issue in issues)
    captioned = usable - by_kind["no-caption"]
    distinct = usable - by_kind["duplicate"] - by_kind["near-duplicate"]
    are = "image is" if total == 1 else "images are"
    have = "has a caption" if captioned == 1 else "have captions"
    advice = next(text for minimum, text in VERDICTS if distinct >= minimum)
    return f"{usable} of {total} {are} usable, {captioned} {have}. {advice}"
