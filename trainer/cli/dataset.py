"""The commands for datasets: check and caption."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import config
from trainer.cli.run_options import Commands
from trainer.errors import ConfigError
from trainer.runs import run_requests

if TYPE_CHECKING:
    from trainer.data.issue import Issue
    from trainer.data.scan import Scan


def add_commands(commands: Commands) -> None:
    _add_check(commands)
    _add_caption(commands)


def _add_check(commands: Commands) -> None:
    check = commands.add_parser("check", help="find issues of a dataset before training on it")
    check.add_argument("dataset", type=Path)
    check.add_argument("--resolution", type=int, default=512)
    check.add_argument("--trigger", default="")
    check.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="a setting of the run to check by, such as dataset.max_aspect=4; can be repeated",
    )
    check.add_argument("--json", action="store_true")
    check.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="KIND[:FIX]",
        help="fix all issues of a kind, which the list shows in brackets; --undo reverts it",
    )
    check.add_argument("--undo", action="store_true", help="undo the last change of the dataset")
    check.set_defaults(command=check_command)


def _add_caption(commands: Commands) -> None:
    caption = commands.add_parser("caption", help="caption the images of a dataset with models")
    caption.add_argument("dataset", type=Path)
    caption.add_argument(
        "--model",
        default="",
        metavar="ID|DIR",
        help="a BLIP, BLIP-2, GIT or Florence-2 model, which writes sentences",
    )
    caption.add_argument(
        "--tagger", default="", metavar="ID|DIR", help="a tagger like WD14, which writes tags"
    )
    caption.add_argument("--prefix", default="", help="text in front of each caption")
    caption.add_argument(
        "--overwrite", action="store_true", help="replace existing captions (default: keep them)"
    )
    caption.add_argument(
        "--threshold",
        type=float,
        default=0.35,
        help="drop tags with a lower score (default: %(default)s)",
    )
    caption.add_argument(
        "--character-threshold",
        type=float,
        default=0.85,
        help="drop character names with a lower score (default: %(default)s)",
    )
    caption.add_argument(
        "--blacklist", default="", metavar="TAG,TAG", help="tags that are never written"
    )
    caption.set_defaults(command=caption_command)


def check_command(options: argparse.Namespace) -> int:
    from trainer.data.checks import verdict

    # Fixes report on standard error, because standard output is for the result.
    if options.undo:
        _undo(options.dataset)
    for kind_and_fix in options.fix:
        _fix(options, kind_and_fix)
    items, issues = _scan(options)
    text = verdict(len(items), issues)
    if options.json:
        print(_as_json(text, len(items), issues))
        return 0
    for issue in issues:
        kind = f" [{issue.kind}]" if issue.kind else ""
        print(f"{issue.level:8} {issue.file}: {issue.message}{kind}")
    print(text)
    return 0


def _scan(options: argparse.Namespace) -> "Scan":
    from trainer.data.scan import scan_dataset

    return scan_dataset(options.dataset, _settings(options))


def _settings(options: argparse.Namespace) -> config.Dataset:
    """Returns the settings to check by. Raises ConfigError if one of them is invalid."""
    changes = dict(config.parse_setting(text) for text in options.settings)
    settings = config.replace(config.RunConfig(), changes).dataset
    update = {"resolution": options.resolution, "trigger": options.trigger}
    if "dataset.bucket_step" not in changes:
        # As in the presets: 64 at 512 pixels and above, 8 at 64.
        update["bucket_step"] = min(64, max(8, options.resolution // 64 * 8))
    # model_copy accepts any resolution. The settings of a run accept only multiples of 8.
    return settings.model_copy(update=update)


def _undo(dataset: Path) -> None:
    from trainer.curation import history

    label, changed_since = history.undo(dataset)
    print(f"Undone: {label}.", file=sys.stderr)
    for name in changed_since:
        print(f"{name} was changed since then, so it stays.", file=sys.stderr)


def _fix(options: argparse.Namespace, kind_and_fix: str) -> None:
    """Applies a fix to all issues of a kind, by default the first fix for that kind."""
    from trainer.curation import fixes

    kind, _, fix = kind_and_fix.partition(":")
    if kind not in fixes.FIXES_FOR_KIND:
        kinds = ", ".join(fixes.FIXES_FOR_KIND)
        raise ConfigError(f"--fix takes a kind of issue, one of {kinds}; got {kind}.")
    issues = [issue for issue in _scan(options).issues if issue.kind == kind]
    if not issues:
        return
    fix = fix or fixes.FIXES_FOR_KIND[kind][0]
    limit = _settings(options).caption_tokens
    count = fixes.apply(options.dataset, issues, fix, limit=limit)
    print(f"{fixes.FIXES[fix].label}: {count} files changed.", file=sys.stderr)


def _as_json(verdict: str, count: int, issues: "Sequence[Issue]") -> str:
    """The keys are older than the present names, and scripts use them."""
    from trainer.curation import fixes

    findings = [
        vars(issue) | {"cures": fixes.FIXES_FOR_KIND.get(issue.kind, ())} for issue in issues
    ]
    return json.dumps({"verdict": verdict, "pictures": count, "findings": findings}, indent=1)


def caption_command(options: argparse.Namespace) -> int:
    from trainer.curation import autocaption

    dataset: Path = options.dataset
    if not dataset.is_dir():
        raise ConfigError(f"{dataset} is not a folder. Pass the folder with the images.")
    blacklist = [tag.strip() for tag in options.blacklist.split(",")]
    request = autocaption.CaptionRequest(
        model=options.model,
        tagger=options.tagger,
        prefix=options.prefix,
        overwrite=options.overwrite,
        threshold=options.threshold,
        character_threshold=options.character_threshold,
        blacklist=tuple(tag for tag in blacklist if tag),
    )

    def stop(*_: object) -> None:
        run_requests.request(autocaption.job_folder(dataset), "stop")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    count = autocaption.caption_dataset(dataset, request, lambda text: print(text, flush=True))
    print(f"{count} captions written. `python -m trainer check {dataset} --undo` reverts them.")
    return 0
