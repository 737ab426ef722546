"""How the embedded base is made, one file a stage; `trainer/embedded/train_base.py` runs them. Nothing else imports these."""
