"""Settings files of other trainers, read as changes to a `RunConfig`.

Each program has a module (`kohya`, `onetrainer`, `ai_toolkit`; `adapter_metadata` and
`image_parameters` for what files contain) with `matches(data)`, which recognises its files, and
`read(data)`, which translates them with three tables: settings with a counterpart here, settings to
ignore, and values at which an unsupported setting has no effect. All other settings are reported
to the user. `reading` chooses the module, `translation` applies the tables. Imports
`trainer.config`.
"""

from trainer.config.interop.reading import apply, read
from trainer.config.interop.translation import ForeignSettings

__all__ = ["ForeignSettings", "apply", "read"]
