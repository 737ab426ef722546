"""What the facts about pictures and captions mean for a training: a finding each, with its reason in a line.

Pure functions; nothing is opened here. The thresholds were chosen on the example pictures (`inspection.blur_effect`).
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence

from trainer.data import token_count
from trainer.data.buckets import MAX_ASPECT
from trainer.data.image_stats import Facts, near_twins
from trainer.data.issues import Issue

BLURRED = 0.65
FLAT = 40  # of 255 greys
FEWEST_FOR_SHARED_TAG = 5
FEWEST, FEW, MANY = (
    5,
    10,
    20,
)  # distinct pictures: below the first too few for anything; from the second a subject, from the third a style

Seen = Sequence[tuple[str, Facts]]
"""(shown path, facts) of the usable pictures."""


def about_image(file: str, name: str, facts: Facts, resolution: int) -> list[Issue]:
    findings = [
        Issue(
            file, "note", f"The picture {note}.", "animated" if "first" in note else "odd-picture"
        )
        for note in facts.notes
    ]
    findings += [
        Issue(file, "note", f"The picture {what}.", kind) for kind, what in facts.conversions
    ]
    if any("\udc80" <= character <= "\udcff" for character in name):
        findings.append(
            Issue(file, "note", "Its name is not UTF-8 and is shown with escapes: rename it.")
        )
    findings += _about_size(file, facts.width, facts.height, resolution)
    if facts.blur > BLURRED:
        message = "The picture looks blurred: the adapter learns the blur too; use a sharper one, or leave it out."
        findings.append(Issue(file, "warning", message, "blurred"))
    if facts.contrast < FLAT:
        message = f"The picture has little contrast ({facts.contrast} of 255): there is little to learn from; edit it, or leave it out."
        findings.append(Issue(file, "note", message, "flat"))
    return findings


def _about_size(file: str, width: int, height: int, resolution: int) -> list[Issue]:
    findings = []
    enlargement = resolution / math.sqrt(width * height)
    if enlargement > 1.05:
        message = (
            f"The picture ({width} x {height}) is smaller than the resolution of {resolution}: it is trained small, "
            f"or blurred by being upscaled {enlargement:.1f} times; use a larger one."
        )
        findings.append(Issue(file, "warning", message, "small"))
    kept = MAX_ASPECT * min(width, height) / max(width, height)
    if kept < 0.75:
        message = (
            f"The picture ({width} x {height}) is so narrow that only the middle {max(1, round(100 * kept))} % of it "
            "is seen: crop it to the part that matters."
        )
        findings.append(Issue(file, "warning", message, "narrow"))
    return findings


def about_twins(used: Seen, captioned: Collection[str]) -> list[Issue]:
    """Exact and near duplicates: of two the one without a caption, else the one with the longer name, as a browser names a copy."""
    first_with: dict[str, str] = {}
    distinct, findings = [], []
    for file, facts in sorted(
        used, key=lambda pair: (pair[0] not in captioned, len(pair[0]), pair[0])
    ):
        twin = first_with.setdefault(facts.sha256, file)
        if twin == file:
            distinct.append((file, facts))
        else:
            message = f"Is the same picture as {twin}: it counts twice; remove one."
            findings.append(Issue(file, "warning", message, "duplicate", twin))
    for later, earlier in near_twins([facts.look for _, facts in distinct]):
        twin = distinct[earlier][0]
        message = f"Looks nearly the same as {twin}: what they share is learned twice as hard; remove one, unless that is wanted."
        findings.append(Issue(distinct[later][0], "note", message, "near-duplicate", twin))
    return findings


def about_sizes(used: Seen, resolution: int) -> list[Issue]:
    small = [file for file, facts in used if facts.width * facts.height * 1.05**2 < resolution**2]
    if not small or len(small) == len(used):
        return []
    message = (
        f"{len(small)} of {len(used)} pictures are smaller than the resolution of {resolution}, the others are not: the adapter sees "
        f"two kinds of sharpness; replace or leave out the small ones, {small[0]} and its like, or choose a lower resolution."
    )
    return [Issue("all pictures", "note", message, "mixed-sizes")]


def about_captions(
    captions: Sequence[tuple[str, str]], trigger: str, count: token_count.Counter, limit: int
) -> list[Issue]:
    """`captions`: (shown path of the picture, caption as it is in the file); `limit`: how many tokens of one are read."""
    findings = []
    for (file, caption), length in zip(
        captions, count([caption for _, caption in captions]), strict=True
    ):
        if not caption:
            use = (
                f"the trigger word “{trigger}” is used alone"
                if trigger
                else "it is trained without words"
            )
            message = f"The picture has no caption: {use}; write one to say what it shows."
            findings.append(Issue(file, "warning", message, "no-caption"))
        elif length > limit:
            message = f"The caption has {length} tokens, and {limit} are read: its end may not be seen. dataset.caption_tokens reads up to 225."
            findings.append(Issue(file, "note", message, "long-caption"))
        if caption and trigger and not has_word(caption, trigger):
            message = f"The caption lacks the trigger word “{trigger}”: it is put in front while training; the file stays as it is."
            findings.append(Issue(file, "note", message, "no-trigger", trigger))
    return findings + _about_shared_tags([caption for _, caption in captions if caption], trigger)


def _about_shared_tags(captions: list[str], trigger: str) -> list[Issue]:
    if len(captions) < FEWEST_FOR_SHARED_TAG:
        return []
    counted = Counter(
        tag
        for caption in captions
        for tag in dict.fromkeys(tag.casefold() for tag in tags_of(caption))
    )
    shared = [
        tag
        for tag, number in counted.items()
        if number == len(captions) and tag != trigger.casefold()
    ]
    return [
        Issue(
            "all captions",
            "note",
            f"Every caption has the tag “{tag}”: it becomes a second trigger word, and the subject shows only where it is said; "
            "remove it where the pictures say it without words.",
            "shared-tag",
            tag,
        )
        for tag in shared
    ]


def tags_of(caption: str) -> list[str]:
    """The parts of a caption between commas, of all its lines."""
    return [tag for tag in map(str.strip, caption.replace("\n", ",").split(",")) if tag]


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text` by itself, in whatever capitals."""
    folded, wanted = text.casefold(), word.casefold()
    start = folded.find(wanted)
    while start >= 0:
        before, after = folded[:start][-1:], folded[start + len(wanted) :][:1]
        if not (before.isalnum() or before == "_" or after.isalnum() or after == "_"):
            return True
        start = folded.find(wanted, start + 1)
    return False


def verdict(pictures: int, findings: Sequence[Issue]) -> str:
    """The scan in a line: "22 of 24 pictures are usable, 20 have captions. Enough for a subject."; `pictures` are the usable ones."""
    by_kind = Counter(finding.kind for finding in findings)
    total = pictures + sum(finding.level == "error" for finding in findings)
    captioned = pictures - by_kind["no-caption"]
    distinct = pictures - by_kind["duplicate"] - by_kind["near-duplicate"]
    are = "picture is" if total == 1 else "pictures are"
    have = "has a caption" if captioned == 1 else "have captions"
    worth = (
        "Enough for a subject or a style." if distinct >= MANY
        else "Enough for a subject." if distinct >= FEW
        else "Few: enough to try; ten or more learn better." if distinct >= FEWEST
        else "Too few to learn from: use ten or more."
    )  # fmt: skip
    return f"{pictures} of {total} {are} usable, {captioned} {have}. {worth}"
