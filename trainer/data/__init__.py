"""From a folder of files to tensors: scanning, checking, bucketing, augmenting and caching.

Reads a dataset and never changes it: changes are made in `trainer.curation`. Imports
`trainer.families` to encode images and captions; all other modules work without torch.
"""
