"""Settings on the page: one widget per field of `RunConfig`, and the presets that a user saved.

Imports `trainer.config` and `trainer.runs`.
"""
