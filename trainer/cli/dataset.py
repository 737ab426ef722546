"""Commands for datasets: check and caption."""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.runs import run_requests


def add_commands(commands: Any) -> None:
    check = commands.add_parser("check", help="say what a dataset is worth before training on it")
    check.add_argument("dataset", type=Path)
    check.add_argument("--resolution", type=int, default=512)
    check.add_argument("--trigger", default="")
    check.add_argument("--json", action="store_true")
    check.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="KIND[:CURE]",
        help="cure all findings of a kind, named in brackets in the list; --undo takes it back",
    )
    check.add_argument(
        "--undo", action="store_true", help="take back the last change made to the dataset"
    )
    check.set_defaults(command=check_command)

    caption = commands.add_parser(
        "caption", help="let models write captions for the pictures of a dataset"
    )
    caption.add_argument("dataset", type=Path)
    caption.add_argument(
        "--model",
        default="",
        metavar="ID|DIR",
        help="writes sentences: a BLIP, BLIP-2, GIT or Florence-2",
    )
    caption.add_argument(
        "--tagger", default="", metavar="ID|DIR", help="writes tags: one of the WD14 kind"
    )
    caption.add_argument("--prefix", default="", help="put in front of each caption")
    caption.add_argument(
        "--overwrite", action="store_true", help="also where there is a caption; else it is kept"
    )
    caption.add_argument(
        "--threshold",
        type=float,
        default=0.35,
        help="tags less sure than this are left out (default: %(default)s)",
    )
    caption.add_argument(
        "--character-threshold",
        type=float,
        default=0.85,
        help="the same for names of characters (default: %(default)s)",
    )
    caption.add_argument(
        "--blacklist", default="", metavar="TAG,TAG", help="tags that are never written"
    )
    caption.set_defaults(command=caption_command)


def check_command(options: argparse.Namespace) -> int:
    from trainer.curation import fixes, history
    from trainer.data.checks import verdict
    from trainer.data.scan import scan_dataset

    def scan() -> tuple:
        return scan_dataset(options.dataset, resolution=options.resolution, trigger=options.trigger)

    if options.undo:
        label, kept = history.undo(options.dataset)
        print(
            f"Taken back: {label}.",
            *(f"{name} was changed since and stays." for name in kept),
            file=sys.stderr,
        )
    for wanted in options.fix:
        kind, _, name = wanted.partition(":")
        if kind not in fixes.FIXES_FOR_KIND:
            raise ConfigError(
                f"--fix takes the kind of a finding, one of {', '.join(fixes.FIXES_FOR_KIND)}; got {kind}."
            )
        found = [finding for finding in scan()[1] if finding.kind == kind]
        if found:
            name = name or fixes.FIXES_FOR_KIND[kind][0]
            print(
                f"{fixes.FIXES[name].label}: {fixes.apply(options.dataset, found, name)} files changed.",
                file=sys.stderr,
            )
    items, findings = scan()
    if options.json:
        found = [
            vars(finding) | {"cures": fixes.FIXES_FOR_KIND.get(finding.kind, ())}
            for finding in findings
        ]
        print(
            json.dumps(
                {
                    "verdict": verdict(len(items), findings),
                    "pictures": len(items),
                    "findings": found,
                },
                indent=1,
            )
        )
        return 0
    for finding in findings:
        print(
            f"{finding.level:8} {finding.file}: {finding.message}{f' [{finding.kind}]' if finding.kind else ''}"
        )
    print(verdict(len(items), findings))
    return 0


def caption_command(options: argparse.Namespace) -> int:
    from trainer.curation import autocaption as caption

    if not options.dataset.is_dir():
        raise ConfigError(f"{options.dataset} is not a folder: give the folder with the pictures.")
    wish = caption.CaptionRequest(
        options.model,
        options.tagger,
        options.prefix,
        options.overwrite,
        options.threshold,
        options.character_threshold,
        tuple(filter(None, map(str.strip, options.blacklist.split(",")))),
    )
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            name, lambda *_: run_requests.request(caption.job_folder(options.dataset), "stop")
        )
    written = caption.caption_dataset(options.dataset, wish, lambda text: print(text, flush=True))
    print(
        f"{written} captions written; python -m trainer check {options.dataset} --undo takes them back."
    )
    return 0
