"""What the tabs share: views that the browser draws, live updates and the theme.

Imports `app.jobs`, `app.gradio_compat` and `trainer.runs`.
"""
