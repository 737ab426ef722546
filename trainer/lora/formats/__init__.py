"""Adapter files of any program. Start with `reader.py`, which does not trust them.

`keys` maps the names of tensors to layers, `stability_names` the names of Stability's layout,
`peft_config` reads the scale of PEFT folders, and `adapted_module` computes delta W of every kind.
The model families import this folder. It imports `trainer.models`.
"""
