"""Runs as plain data for the views that the browser draws. No markup, no Gradio.

Imports `app.jobs` and the torch-free modules of `trainer`.
"""
