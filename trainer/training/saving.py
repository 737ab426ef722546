"""Checkpoints, the adapter files of a save, and the chosen file at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.data import latent_cache
from trainer.errors import NotLearning
from trainer.lora import analysis, inject, metadata, textual_inversion, writer
from trainer.lora.formats.reader import read_adapter
from trainer.models.device import DTYPES
from trainer.runs import run_folder, run_requests, run_status
from trainer.runs.events import (
    AdapterSaved,
    Finished,
    StateSaved,
    Stopped,
)
from trainer.training.optimizers import (
    optimizer_state,
)
from trainer.training.session import Session
from trainer.training.trainer_state import (
    State,
    save_state,
)
from trainer.training.validation import measure


def keep_state(session: Session, step: int, facts: dict) -> None:
    if not session.world.is_main:
        return
    adapter = {
        name: parameter.detach().cpu().contiguous() for name, parameter in session.kept.items()
    }
    average = {}
    if session.average:
        average = {
            name: tensor.cpu()
            for name, tensor in zip(session.parameters, session.average.shadow_params, strict=True)
        }
        facts["averaged_steps"] = session.average.optimization_step
    tensors, facts["optimizer"] = optimizer_state(session.optimizer)
    save_state(session.folder, State(step, adapter, tensors, average, facts))
    session.log.append(StateSaved(step))


@contextmanager
def final_weights(session: Session) -> Iterator[None]:
    """Inside, the adapter holds the weights that are saved, measured and sampled: their average, where the settings or the optimiser
    (schedule-free: Defazio et al. 2024, arXiv:2405.15682) ask for one. Afterwards those of the training are back, to the bit.
    """
    averaging = hasattr(session.optimizer, "eval")
    if not averaging and not session.average:
        yield
        return
    parameters = list(session.parameters.values())
    training = [p.detach().clone() for p in parameters]
    if averaging:
        session.optimizer.eval()
    if session.average:
        session.average.copy_to(parameters)
    try:
        yield
    finally:
        if averaging:
            session.optimizer.train()
        with torch.no_grad():
            for parameter, before in zip(parameters, training, strict=True):
                parameter.copy_(before)


def keep_adapter(session: Session, step: int, facts: dict) -> None:
    """The adapter as a file in each dialect, read back and compared; and its loss on the held-out pictures."""
    run, base = session.run, session.base
    modules = list(inject.adapted_modules(session.components))
    pictures = [e for e in session.examples if e.resolution == run.dataset.resolution]
    values = metadata.metadata_for(
        run,
        base.family,
        modules=modules,
        step=step,
        total_steps=session.total_steps,
        sizes=[(e.views[0].size_ids[5], e.views[0].size_ids[4]) for e in pictures],
        captions=[e.caption for e in pictures],
        base_hash=latent_cache.legacy_model_hash(base.files.weights[base.files.denoiser][0]),
        prediction_type=session.objective.prediction_type,
        started=facts["started"],
        finished=time.time(),
    )
    names = adapter_names(session, step)
    for dialect, name in names.items():
        writer.save_adapter(
            session.folder / name,
            dialect,
            modules,
            base.family,
            DTYPES[run.saving.precision],
            values,
        )
        writer.verify(session.folder / name, modules)
    if session.trigger:
        path = run_folder.embedding_path(session.folder / next(iter(names.values())))
        textual_inversion.save_embedding(
            path, session.trigger, base.family, DTYPES[run.saving.precision], values
        )
    session.log.append(AdapterSaved(step, next(iter(names.values())), measure(session, step)))


def adapter_names(session: Session, step: int | None = None) -> dict[str, str]:
    """File name by dialect. The first one is the file that the page shows; PEFT's is a folder, and never the first."""
    stem = f"{run_folder.slug(session.run.name)}{'' if step is None else f'-{step:06d}'}"
    dialects: tuple[str, ...] = session.run.saving.dialects or (session.base.family.dialect,)
    first = next(dialect for dialect in dialects if dialect != "peft")
    others = {
        dialect: f"{stem}-{dialect}{'' if dialect == 'peft' else '.safetensors'}"
        for dialect in dialects
        if dialect != first
    }
    return {first: f"{stem}.safetensors", **others}


def saved_files(session: Session, step: int | None = None) -> list[Path]:
    """All that belongs to a save, the adapter that the page shows first."""
    files = [session.folder / name for name in adapter_names(session, step).values()]
    return files + ([run_folder.embedding_path(files[0])] if session.trigger else [])


def finish(session: Session, step: int, clock: float) -> Path:
    """Gives the chosen save, whose files were read back and compared, the adapter's plain name."""
    status = run_status.read_status(session.folder)
    if step == 0:  # stopped before the first step: there is nothing to save
        run_requests.withdraw(session.folder, "stop")
        session.log.append(Stopped(0, ""))
        return session.folder
    best = status.best_step or step
    chosen = best if session.run.saving.main == "best" else step
    if not all(path.exists() for path in saved_files(session, chosen)):
        chosen = step  # that save was taken away meanwhile
    picture = next((sample.file for sample in status.samples if sample.step == chosen), "")
    added = (
        metadata.thumbnail(session.folder / picture)
        if picture and session.run.saving.include_thumbnail
        else None
    )
    files = saved_files(session)
    for source, target in zip(saved_files(session, chosen), files, strict=True):
        writer.copy_adapter(source, target, added)
    file = files[0]
    analysis.write(
        session.folder,
        read_adapter(file).modules,
        next(iter(adapter_names(session))),
        session.run.saving.precision,
    )
    if step < session.total_steps and not status.ended_early:
        run_requests.withdraw(session.folder, "stop")
        session.log.append(Stopped(step, file.name, chosen))
        return file
    check_adapter_acts(session)
    session.log.append(Finished(step, file.name, best, time.monotonic() - clock, chosen))
    return file


def check_adapter_acts(session: Session) -> None:
    for part, component in session.components.items():
        if not any(module.delta.any() for module in inject.adapted_modules({part: component})):
            raise NotLearning(
                f"The adapter changes nothing in the {part}: it was trained too short or with too low a learning rate."
            )
