"""The command line: `python -m trainer COMMAND`, one module per group of commands.

Imports everything; nothing imports it.
"""
