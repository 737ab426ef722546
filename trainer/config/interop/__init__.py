"""Settings files of other trainers, read as changes to a `RunConfig`. One module per program.

Each module contains `matches(data)`, which recognises its files, and `read(data)`, which translates
them with three tables: the settings with a counterpart here, the settings to ignore, and the
values at which an unsupported setting has no effect. Every other setting is reported to the user
and never dropped silently. Imports `trainer.config`.
"""

from trainer.config.interop.reading import apply, read
from trainer.config.interop.translation import ForeignSettings

__all__ = ["ForeignSettings", "apply", "read"]
