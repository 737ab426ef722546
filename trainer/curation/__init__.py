"""Editing a dataset: adding files, fixing issues, and writing captions by hand or with models.

Every change to existing files goes through `history`, which can undo it to the byte. Imports
`trainer.data`, `trainer.models` and `trainer.runs`. No module imports torch when it is imported;
`autocaption` does so in a separate process.
"""
