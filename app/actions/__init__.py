"""What a person can do on the page, as plain functions without Gradio.

Imports `app.jobs`, `app.views`, `app.settings` and the torch-free modules of `trainer`.
"""
