"""From a folder of files to tensors: scanning, checking, cropping, augmenting and caching.

Start with `scan.py`. This folder reads a dataset and never changes it; `trainer.curation` does.
Imports `trainer.families` to encode images and captions. `examples`, `latent_cache` and `sampler`
need torch; the other modules work without it.
"""
