"""Base models without the arithmetic of a family: finding, checking, downloading and running them.

`attention`, `cpu_conv`, `device`, `libraries`, `quantization` and `seeds` need torch. All other
modules work without it, so the page may import them. Imports `trainer.config` and `trainer.runs`.
"""
