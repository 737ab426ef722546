"""From a folder of files to tensors: scanning, checking, cropping, augmenting and caching.

Start with `scan.py`. `checks` finds the issues of a dataset, `issue` is their record. Changes to a
dataset are made in `trainer.curation`. Imports `trainer.config`, `trainer.runs`, `trainer.models`,
and `trainer.families` to encode images and captions. Only `examples`, `latent_cache` and `sampler`
need torch.
"""
