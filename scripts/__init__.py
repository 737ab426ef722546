"""Scripts that ran once, kept so that their results can be repeated."""
