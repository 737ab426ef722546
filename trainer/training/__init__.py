"""One training, from settings to a finished adapter. Start with `loop.py`.

`setup` prepares it, `step/` is one step, `recovery` handles what goes wrong, `oom_fallbacks` what
happens if memory runs out, `saving` writes adapters and checkpoints. A new optimiser is a row in
`optimizers`. Imports every folder except `trainer.curation` and `trainer.cli`. `estimate` and
`launch` work without torch, so the page can import them.
"""
