"""LoRA adapters: choosing layers, injecting, exporting, applying and transforming them.

Files of other programs are read in `formats/`, which lies below the model families, because
families map keys. All other modules here are above the families: they import `trainer.families`,
`trainer.models`, `trainer.runs` and `trainer.config`.
"""
