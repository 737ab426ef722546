"""The processes that the page starts and follows: trainings, previews and cluster jobs.

Imports the torch-free modules of `trainer`, and no Gradio.
"""
