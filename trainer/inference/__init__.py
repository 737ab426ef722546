"""Images from a base model with adapters at any strength, and what they show.

Imports `trainer.lora`, `trainer.data` and everything below them.
"""
