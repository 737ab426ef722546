"""The engine of LoRA Atelier: usable alone (`python -m trainer`), knows nothing of the page."""

__version__ = "0.1.0"
