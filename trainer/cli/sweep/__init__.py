"""Sweeps: a run for every combination of some settings, and a comparison of the results."""
