"""Checkpoints, the adapter files of a save, and the chosen file at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.data import latent_cache
from trainer.errors import NotLearning
from trainer.lora import analysis, inject, metadata, textual_inversion, writer
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import read_adapter
from trainer.models.device import DTYPES
from trainer.runs import run_folder, run_requests, run_status
from trainer.runs.events import AdapterSaved, Finished, StateSaved, Stopped
from trainer.training.optimizers import optimizer_state
from trainer.training.session import Session
from trainer.training.trainer_state import Checkpoint, TrainerState, save_checkpoint
from trainer.training.validation import validate


def write_checkpoint(session: Session, step: int, state: TrainerState) -> None:
    """Saves everything that resuming needs. Only rank 0 writes."""
    if not session.world.is_main:
        return
    optimisation = session.optimisation
    adapter = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in session.saved_parameters.items()
    }
    average = {}
    if optimisation.average:
        shadow_params = optimisation.average.shadow_params
        for name, tensor in zip(optimisation.parameters, shadow_params, strict=True):
            average[name] = tensor.cpu()
        state.averaged_steps = optimisation.average.optimization_step
    tensors, record = optimizer_state(optimisation.optimizer)
    save_checkpoint(session.folder, Checkpoint(step, adapter, tensors, average, record, state))
    session.log.append(StateSaved(step))


@contextmanager
def final_weights(session: Session) -> Iterator[None]:
    """Puts the weights that are saved, validated and sampled into the adapter.

    These are averages if the settings ask for a moving average, or if the optimiser averages
    (schedule-free: Defazio et al. 2024, arXiv:2405.15682). Afterwards the training weights are
    restored to the bit.
    """
    optimizer, average = session.optimisation.optimizer, session.optimisation.average
    is_schedule_free = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if not is_schedule_free and not average:
        yield
        return
    parameters = list(session.optimisation.parameters.values())
    training_weights = [parameter.detach().clone() for parameter in parameters]
    if is_schedule_free:
        optimizer.eval()
    if average:
        average.copy_to(parameters)
    try:
        yield
    finally:
        if is_schedule_free:
            optimizer.train()
        with torch.no_grad():
            for parameter, weights in zip(parameters, training_weights, strict=True):
                parameter.copy_(weights)


def save_adapter(session: Session, step: int, state: TrainerState) -> None:
    """Writes the adapter in each format, verifies each file, and validates the weights."""
    run, family = session.run, session.model.base.family
    dtype = DTYPES[run.saving.precision]
    modules = list(inject.adapted_modules(session.model.components))
    values = _metadata(session, modules, step, state)
    names = adapter_names(session, step)
    for file_format, name in names.items():
        path = session.folder / name
        writer.save_adapter(path, file_format, modules, family, dtype, values)
        writer.verify(path, modules)
    main_name = next(iter(names.values()))
    if session.model.trigger:
        path = run_folder.embedding_path(session.folder / main_name)
        textual_inversion.save_embedding(path, session.model.trigger, family, dtype, values)
    session.log.append(AdapterSaved(step, main_name, validate(session, step)))


def _metadata(
    session: Session, modules: list[AdaptedModule], step: int, state: TrainerState
) -> dict[str, str]:
    run, base = session.run, session.model.base
    resolution = run.dataset.resolution
    examples = [each for each in session.data.examples if each.resolution == resolution]
    size_ids = [example.views[0].size_ids for example in examples]
    return metadata.metadata_for(
        run,
        base.family,
        modules=modules,
        step=step,
        total_steps=session.total_steps,
        sizes=[(width, height) for *_, height, width in size_ids],
        captions=[example.caption for example in examples],
        base_hash=latent_cache.legacy_model_hash(base.files.weights[base.files.denoiser][0]),
        prediction_type=session.model.objective.prediction_type,
        started=state.identity.started,
        finished=time.time(),
    )


def adapter_names(session: Session, step: int | None = None) -> dict[str, str]:
    """Returns the file names of a save by format, or of the chosen save if `step` is None.

    The first is the file that the page shows. PEFT's is a folder, so it is never the first.
    """
    stem = run_folder.slug(session.run.name)
    if step is not None:
        stem = f"{stem}-{step:06d}"
    formats: list[str] = list(session.run.saving.dialects)
    formats = formats or [session.model.base.family.default_format]
    first = next(name for name in formats if name != "peft")
    names = {first: f"{stem}.safetensors"}
    for name in formats:
        if name != first:
            names[name] = f"{stem}-peft" if name == "peft" else f"{stem}-{name}.safetensors"
    return names


def saved_files(session: Session, step: int | None = None) -> list[Path]:
    """Returns all files of a save, the file that the page shows first."""
    files = [session.folder / name for name in adapter_names(session, step).values()]
    if session.model.trigger:
        files.append(run_folder.embedding_path(files[0]))
    return files


def finish(session: Session, step: int, clock: float) -> Path:
    """Copies the chosen save to the adapter's plain name and ends the run.

    `clock` is the monotonic time at which the training would have started without interruptions.
    Raises NotLearning if a finished adapter changes nothing.
    """
    log, folder = session.log, session.folder
    if step == 0:  # stopped before the first step: there is nothing to save
        run_requests.withdraw(folder, "stop")
        log.append(Stopped(0, ""))
        return folder
    status = run_status.read_status(folder)
    best = status.best_step or step
    chosen = best if session.run.saving.main == "best" else step
    if not all(path.exists() for path in saved_files(session, chosen)):
        chosen = step  # the user has deleted the best save
    file = _copy_save(session, chosen, status)
    if step < session.total_steps and not status.ended_early:
        run_requests.withdraw(folder, "stop")
        log.append(Stopped(step, file.name, chosen))
        return file
    _check_adapter_acts(session)
    log.append(Finished(step, file.name, best, time.monotonic() - clock, chosen))
    return file


def _copy_save(session: Session, step: int, status: run_status.RunStatus) -> Path:
    """Copies a save to the plain names, with a sample as thumbnail. Returns the main file."""
    saving = session.run.saving
    sample = next((sample.file for sample in status.samples if sample.step == step), "")
    thumbnail = None
    if sample and saving.include_thumbnail:
        thumbnail = metadata.thumbnail(session.folder / sample)
    files = saved_files(session)
    for source, target in zip(saved_files(session, step), files, strict=True):
        writer.copy_adapter(source, target, thumbnail)
    main_format = next(iter(adapter_names(session)))
    modules = read_adapter(files[0]).modules
    analysis.write(session.folder, modules, main_format, saving.precision)
    return files[0]


def _check_adapter_acts(session: Session) -> None:
    for part, component in session.model.components.items():
        modules = inject.adapted_modules({part: component})
        if not any(module.delta.any() for module in modules):
            raise NotLearning(
                f"The adapter changes nothing in the {part}: it was trained for too few steps "
                "or at too low a learning rate."
            )
