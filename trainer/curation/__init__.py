"""Editing a dataset: adding files, fixing issues, editing captions, writing captions by models.

Every change goes through `history`, which can undo it to the byte. Imports `trainer.data`, and
never torch when it is imported (`autocaption` loads it in its own process).
"""
