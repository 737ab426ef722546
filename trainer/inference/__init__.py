"""Images from a base model with adapters at any strength, and checks of what they show.

`request` describes a sample and works without torch, so that the page can import it. This folder
imports `trainer.lora`, `trainer.data` and everything below them.
"""
