"""Errors that a user can act on.

Each message contains what is wrong, with the value found, and then what to do. Any exception that
is not a `TrainerError` is a bug, and keeps its traceback.
"""


class TrainerError(Exception):
    """Base class of the errors that a user can correct. The page shows the message unchanged."""


class ConfigError(TrainerError):
    """A setting is unknown, out of bounds, or contradicts another one."""


class DatasetError(TrainerError):
    """An image, a caption or the folder of a dataset cannot be used."""


class ModelError(TrainerError):
    """A base model or an adapter file is missing, damaged, hostile or of the wrong kind."""


class StateError(TrainerError):
    """A run cannot be started or resumed from the files in its folder."""


class DiskError(TrainerError):
    """The disk is full, or a folder is not writable."""


class OutOfMemory(TrainerError):
    """The device has too little memory for these settings."""


class ProcessLost(TrainerError):
    """Another process of a distributed training ended."""


class NotLearning(TrainerError):
    """The adapter cannot learn: it gets no gradients, or its numbers are not finite."""
