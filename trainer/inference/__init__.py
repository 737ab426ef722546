"""Images from a base model with adapters at any strength, and checks of what they show.

`request` describes a sample and works without torch, so the page can import it. Imports
`trainer.lora`, `trainer.data`, `trainer.families`, `trainer.models`, `trainer.runs` and
`trainer.config`.
"""
