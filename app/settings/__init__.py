"""Widgets for the settings of a run, and the presets that a user saved.

`form` makes one widget per field of `RunConfig`. Labels and help texts are declared with the
fields, in `trainer/config/settings`. Imports `trainer.config` and `trainer.runs`.
"""
