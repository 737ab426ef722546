"""Settings files of other trainers, read as changes to a `RunConfig`. One module per program."""
