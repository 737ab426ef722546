"""The command line: `python -m trainer COMMAND`. Start with `main.py`.

A module with commands adds them to the parser in `add_commands`. Modules that need torch are
imported by the commands that use them, so `--help` is quick. This folder may import everything.
Only `trainer/__main__.py` imports it.
"""
