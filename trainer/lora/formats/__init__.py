"""LoRA files of any program: their keys, and a reader that trusts nothing.

Lies below the model families, which map keys of their own. Imports `trainer.models`.
"""
