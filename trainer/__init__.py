"""The engine of LoRA Atelier: usable alone (`python -m trainer`, `from trainer import RunConfig, run`), knows nothing of the page."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.errors import TrainerError
    from trainer.training.runner import Result, run

__version__ = "0.1.0"
__all__ = ["Result", "RunConfig", "TrainerError", "run"]
_PLACES = {
    "Result": "training.runner",
    "RunConfig": "config",
    "TrainerError": "errors",
    "run": "training.runner",
}


def __getattr__(name: str) -> Any:
    """Read when they are asked for, since their modules need this one."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
