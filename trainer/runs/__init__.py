"""What a run leaves on disk: its folder, events, requests, log and report.

The page, the command line and the trainer share runs only through these files. Imports
`trainer.config`, and never torch (`trackers` loads accelerate when a run asks for one).
"""
