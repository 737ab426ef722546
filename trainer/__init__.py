"""The engine of LoRA Atelier. It works without the page, which is in `app/`.

From Python: `from trainer import RunConfig, run`. From a terminal: `python -m trainer`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.models.cpu_threads import wait_passively

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.errors import TrainerError
    from trainer.training.runner import Result, run

# Runs before torch is imported, however the engine is started: OpenMP reads the settings once.
wait_passively()

__version__ = "0.1.0"
__all__ = ["Result", "RunConfig", "TrainerError", "run"]
_MODULES = {
    "Result": "trainer.training.runner",
    "RunConfig": "trainer.config",
    "TrainerError": "trainer.errors",
    "run": "trainer.training.runner",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, because its module imports this one."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
