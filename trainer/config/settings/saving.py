"""The section [saving]."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.settings.section import PositiveInt, Section


class Saving(Section):
    """What is kept."""

    main: Literal["best", "last"] = "best"
    """Which save becomes the finished file. best: the latest one that is not clearly worse on the held-out pictures than the best of all, so one before the run began to memorise; without held-out pictures the last one. All saves are kept either way."""
    saves: Annotated[int, Field(ge=1, le=100)] = 5
    """The run is cut into this many equal parts. At the end of each the adapter is saved, measured and sampled."""
    state_every: PositiveInt = 100
    """Steps between two states. At most these steps are lost when the machine stops."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number format of the finished file. fp16 is read everywhere."""
    dialects: tuple[Literal["kohya", "diffusers", "peft"], ...] = ()
    """Formats of the file: kohya is read by most programs, diffusers and peft (a folder) by those of these names. Empty: the one that most programs read for this kind of base."""
    tracking: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also report losses, learning rate and samples to a tracker, whose package must be installed. tensorboard and trackio write files on this machine; wandb sends them to its service, unless WANDB_MODE=offline is set."""
    include_captions: bool = False
    """Write how often each tag occurs, and the sample prompts, into the file. Off keeps them private."""
    include_folders: bool = False
    """Write the name of the dataset folder and the path of the base model into the file, without the home folder. Off keeps them private."""
    include_thumbnail: bool = False
    """Write a small picture into the finished file, which programs show beside its name: the first sample of the save it is. Off keeps it private."""
    include_config: bool = True
    """Write all settings into the file, so that the run can be repeated from it."""
