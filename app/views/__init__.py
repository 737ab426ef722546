"""Runs as plain data for the views that the browser draws. No markup, no Gradio.

Each `*_view` function returns a record of `app.views.records` as JSON-like data.

Imports `app.jobs`, `app.settings` and the torch-free modules of `trainer`.
"""
