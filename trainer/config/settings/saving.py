"""The section [saving] of the settings."""

from typing import Literal

from pydantic import Field

from trainer.config.settings.section import Section


class Saving(Section):
    """The files of a run and their metadata."""

    main: Literal["best", "last"] = Field(default="best", title="Finished file")
    """Which save becomes the finished file. best: the latest save whose validation loss is not
    clearly worse than the lowest of all saves, so one from before the run began to memorise;
    without a validation set, the last save. All saves are kept in both cases."""

    saves: int = Field(default=5, title="Number of saves", ge=1, le=100)
    """The run is divided into this many equal parts. At the end of each part the adapter is
    saved, validated and sampled."""

    state_every: int = Field(default=100, title="Checkpoint every N steps", ge=1)
    """Steps between two checkpoints, from which a run can be resumed. If the machine stops, at
    most this many steps are lost."""

    precision: Literal["fp16", "bf16", "fp32"] = Field(default="fp16", title="Save precision")
    """Number format of the finished file. Every program reads fp16."""

    dialects: tuple[Literal["kohya", "diffusers", "peft"], ...] = Field(
        default=(), title="File formats"
    )
    """kohya: most programs read it. diffusers and peft (a folder): for the libraries of these
    names. Empty: the format that most programs read for this kind of base model."""

    tracking: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none", title="Log with"
    )
    """Also reports losses, learning rate and samples to a tracker, whose package must be
    installed. tensorboard and trackio write files on this machine. wandb sends them to its
    service, unless WANDB_MODE=offline is set."""

    include_captions: bool = Field(default=False, title="Tags and prompts in metadata")
    """Writes how often each tag occurs, and the sample prompts, into the file. Off keeps them
    private."""

    include_folders: bool = Field(default=False, title="Folder names in metadata")
    """Writes the name of the dataset folder and the path of the base model into the file, without
    the home folder. Off keeps them private."""

    include_thumbnail: bool = Field(default=False, title="Thumbnail in metadata")
    """Writes a small image into the finished file, which programs show beside its name: the first
    sample of that save. Off keeps it private."""

    include_config: bool = Field(default=True, title="Settings in metadata")
    """Writes all settings into the file, so that the run can be repeated from it."""
