"""The command that shows and clears the caches."""

import argparse
from typing import Any

from trainer.runs import cache_limits


def add_commands(commands: Any) -> None:
    cache = commands.add_parser("cache", help="say how large the caches are, or clear them")
    cache.add_argument(
        "--clear", action="store_true", help="delete latents, embeddings, thumbnails and previews"
    )
    cache.set_defaults(command=cache_command)


def cache_command(options: argparse.Namespace) -> int:
    print(
        f"{cache_limits.cache_folder()} holds {cache_limits.size() / 1e6:,.1f} MB; the limit is {cache_limits.limit() / 1e9:g} GB ($ATELIER_CACHE_GB)."
    )
    if options.clear:
        print(
            f"{cache_limits.clear() / 1e6:,.1f} MB were freed; what is needed again is made anew."
        )
    return 0
