"""Adapter files of any program: their keys, and a reader that does not trust them.

The model families import this folder to map their keys. It imports `trainer.models`.
"""
