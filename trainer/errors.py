"""The errors a person at the page can act on.

Each message is whole sentences: what was found, where, and what to do. Anything that is not a
`TrainerError` is a bug and keeps its traceback.
"""


class TrainerError(Exception):
    """Something the person can put right; its text is shown as it is."""


class ConfigError(TrainerError):
    """A setting is unknown, out of bounds, or contradicts another."""


class DatasetError(TrainerError):
    """A picture, a caption or the folder around them cannot be used."""


class ModelError(TrainerError):
    """A base model or an adapter file is missing, damaged, hostile or of the wrong kind."""


class StateError(TrainerError):
    """A run folder cannot be started or resumed as it is."""


class DiskError(TrainerError):
    """The disk is full, or the folder cannot be written."""


class OutOfMemory(TrainerError):
    """The device has too little memory for these settings."""


class ProcessLost(TrainerError):
    """Another process of the same training ended."""


class NotLearning(TrainerError):
    """The run can give no useful adapter: no gradient arrives, or the numbers are not finite."""
