"""The base model that ships with the program, its examples, and a score for its images.

Imports nothing else of `trainer`. `scripts/embedded_base` trained the model.
"""
