"""LoRA adapters: choosing layers, injecting, exporting, applying and transforming them.

Reading the file formats of other programs is in `formats/`. Imports `trainer.families` and
everything below it, but nothing of `trainer.data` or `trainer.training`.
"""
