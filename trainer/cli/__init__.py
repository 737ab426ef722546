"""The command line: `python -m trainer COMMAND`.

Each module adds its commands to the parser, in `add_commands`. Modules that need torch are
imported by the commands that use them, so `--help` is quick. This folder may import everything;
nothing imports it.
"""
