"""Base models before any family's arithmetic: finding, checking, downloading and running them.

`model_files`, `single_file`, `safetensors_header` and `hub` work without torch, so the page may
import them. Imports `trainer.config` and `trainer.runs`.
"""
