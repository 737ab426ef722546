"""The four tabs of the page: Gradio components and their events.

Each tab has a module with its name. `train_form` and `train_actions` belong to the Train tab,
`preview_plans` to the Preview tab. The labels of settings are declared with the settings, in
`trainer/config/settings`. Imports `app.page`, `app.actions`, `app.views`, `app.settings`,
`app.jobs` and the torch-free modules of `trainer`.
"""
