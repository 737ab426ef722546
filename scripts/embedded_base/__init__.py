"""How the embedded base is made, one file a stage; `scripts/embedded_base/train.py` runs them. Nothing else imports these."""
