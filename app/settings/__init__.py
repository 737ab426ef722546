"""Settings on the page: one widget per field of `RunConfig`, and the presets a person saved.

Imports `trainer.config` and `trainer.runs`.
"""
