"""The processes that the page starts and follows: trainings, samples and cluster jobs.

Imports `app.accounts` and the torch-free modules of `trainer`, and no Gradio.
"""
