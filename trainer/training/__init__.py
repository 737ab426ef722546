"""One training, from settings to a finished adapter: setup, loop, recovery, saving, validation.

Start with `loop.py`. Imports every folder except `trainer.curation` and `trainer.cli`. The page
may import `estimate` and `launch`, which work without torch.
"""
