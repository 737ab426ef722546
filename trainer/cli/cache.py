"""The command that shows and clears the caches: cache."""

import argparse

from trainer.cli.run_options import Commands
from trainer.runs import cache_limits


def add_commands(commands: Commands) -> None:
    cache = commands.add_parser("cache", help="show the size of the caches, or clear them")
    cache.add_argument(
        "--clear", action="store_true", help="delete latents, embeddings, thumbnails and previews"
    )
    cache.set_defaults(command=cache_command)


def cache_command(options: argparse.Namespace) -> int:
    print(
        f"{cache_limits.cache_folder()} contains {cache_limits.size() / 1e6:,.1f} MB; "
        f"the limit is {cache_limits.limit() / 1e9:g} GB ($ATELIER_CACHE_GB)."
    )
    if options.clear:
        freed = cache_limits.clear()
        print(f"Freed {freed / 1e6:,.1f} MB. Runs fill the caches again when needed.")
    return 0
