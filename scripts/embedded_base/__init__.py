"""Makes the embedded base, with one module per stage. `train.py` runs the stages."""
