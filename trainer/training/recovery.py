"""Resuming, skipped steps, rolling back, and fallbacks when memory runs out."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import fingerprint, replace
from trainer.data.examples import Example
from trainer.data.sampler import batch_at
from trainer.errors import ConfigError, NotLearning, ProcessLost
from trainer.lora import inject
from trainer.runs.events import RolledBack, StepDone, Warned
from trainer.training import oom_fallbacks
from trainer.training.optimizers import restore_optimizer, try_optimizer
from trainer.training.saving import write_checkpoint
from trainer.training.session import Session, optimizer_for
from trainer.training.step.cuda_graphs import GraphedPredict
from trainer.training.step.optimizer_step import PendingStep
from trainer.training.trainer_state import (
    Checkpoint,
    RunIdentity,
    TrainerState,
    check_unchanged,
    load_checkpoint,
    restore_parameters,
)
from trainer.training.validation import fixed_losses

MAX_BAD_STEPS = 3
"""After so many skipped steps in a row the run rolls back."""
MAX_ROLLBACKS = 2
"""After so many rollbacks the run fails."""
ROLLBACK_LR_FACTOR = 0.5
"""Each rollback multiplies the learning rate by this."""


def restore(session: Session) -> tuple[TrainerState, int]:
    """Loads the newest checkpoint into the session. Returns its trainer state and its step.

    Returns a new state and step 0 if there is no checkpoint. Raises StateError if the settings or
    the dataset changed since the run started.
    """
    identity = RunIdentity(fingerprint(session.run), session.data.fingerprints(), time.time())
    checkpoint, warnings = load_checkpoint(session.folder)
    for warning in warnings:
        session.log.append(Warned(warning))
    if checkpoint is None:
        return TrainerState(identity), 0
    check_unchanged(checkpoint.state.identity, identity)
    # A fallback may have replaced the optimiser, so it comes before the optimiser's tensors.
    session.fallbacks.catch_up("step", checkpoint.step)
    load_into(session, checkpoint)
    return checkpoint.state, checkpoint.step


def load_into(session: Session, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's tensors into the adapter, the optimiser and the average."""
    optimisation = session.optimisation
    restore_parameters(session.saved_parameters, checkpoint.adapter)
    saved_class = checkpoint.optimizer_record["class"]
    if optimisation.is_8bit_fallback and saved_class != type(optimisation.optimizer).__name__:
        # Saved before the switch to 8-bit Adam, so its moments cannot be loaded.
        optimisation.optimizer.state.clear()
    else:
        restore_optimizer(optimisation.optimizer, checkpoint.optimizer, checkpoint.optimizer_record)
    if optimisation.average:
        optimisation.average.shadow_params = [
            checkpoint.average[name].to(session.device) for name in optimisation.parameters
        ]
        optimisation.average.optimization_step = checkpoint.state.averaged_steps


def report_finished_steps(
    session: Session, pending: list[PendingStep], state: TrainerState, leave: int = 0
) -> None:
    """Reports the pending steps except the newest `leave`, and counts skipped steps in a row.

    On CUDA the newest result is read one step later, so the GPU never waits for the host.
    """
    while len(pending) > leave and state.bad_steps < MAX_BAD_STEPS:
        done = pending.pop(0)
        loss, finite = done.outcome.values()
        end = time.monotonic()
        _count_bad_steps(state, done, loss, bool(finite))
        if not state.bad_steps:
            session.log.append(StepDone(done.step, loss, done.learning_rate, end - done.begun))
        elif state.bad_steps < MAX_BAD_STEPS:
            cause = find_cause(session, done.step)
            session.log.append(
                Warned(
                    f"Step {done.step} was skipped: its loss or gradients were not finite. {cause}"
                )
            )
        for later in pending:
            later.begun = end


def _count_bad_steps(state: TrainerState, done: PendingStep, loss: float, finite: bool) -> None:
    if finite:
        state.bad_steps = 0
    elif not (math.isfinite(loss) and done.may_overflow):
        state.bad_steps += 1


def must_roll_back(session: Session, state: TrainerState, is_checkpoint: bool) -> bool:
    """Returns whether steps or, before they are written, weights are not finite."""
    if state.bad_steps >= MAX_BAD_STEPS:
        return True
    return is_checkpoint and not _finite_weights(session)


def _finite_weights(session: Session) -> bool:
    parameters = session.optimisation.parameters.values()
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def roll_back(session: Session, step: int, state: TrainerState) -> int:
    """Loads the last good checkpoint, lowers the learning rate and returns the checkpoint's step.

    Raises NotLearning with the cause after MAX_ROLLBACKS. The decision becomes part of the trainer
    state, and is saved at once, so a resumed run takes the same path.
    """
    cause = find_cause(session, step)
    checkpoint, _ = load_checkpoint(session.folder, lambda found: not found.state.bad_steps)
    if checkpoint is None or state.rollbacks >= MAX_ROLLBACKS:
        raise NotLearning(
            f"The training has had numbers that are not finite up to step {step}. {cause} "
            "The last checkpoint is kept."
        )
    session.world.meet()  # every rank has read the checkpoint before rank 0 overwrites it
    load_into(session, checkpoint)
    state.lr_scale *= ROLLBACK_LR_FACTOR
    state.rollbacks += 1
    state.bad_steps = 0
    # The event comes before the checkpoint: a resumed run learns from it which fallbacks were
    # active when the checkpoint was written.
    session.log.append(
        RolledBack(
            checkpoint.step,
            step,
            state.lr_scale,
            f"The numbers were not finite up to step {step}, so the training went back to step "
            f"{checkpoint.step} and goes on with {state.lr_scale:g} times the learning rate. "
            f"{cause}",
        )
    )
    write_checkpoint(session, checkpoint.step, state)
    return checkpoint.step


def find_cause(session: Session, step: int) -> str:
    """Returns why the numbers of a step are not finite, and what to do, as sentences.

    An image is the cause if its latents, or its loss on the base without the adapter, are not
    finite. Otherwise the learning rate is too high.
    """
    precision = session.precision
    with inject.adapters_disabled(session.model.components.values()):
        for example in _examples_of_step(session, step):
            if not _has_finite_latents(example):
                return (
                    f"The latents of {example.name} are not finite: save that image again, "
                    "or leave it out."
                )
            if not torch.isfinite(fixed_losses(session, example)).all():
                advice = "leave that image out."
                if precision != "fp32":
                    advice = f"use base.precision = fp32, or {advice}"
                return (
                    f"The base itself gives no finite numbers for {example.name} in {precision}: "
                    f"{advice}"
                )
    return (
        f"Lower the learning rate (now {session.run.training.learning_rate:g}), "
        f"or use base.precision = fp32 (now {precision})."
    )


def _examples_of_step(session: Session, step: int) -> list[Example]:
    training, data = session.run.training, session.data
    microbatches = training.gradient_accumulation_steps
    seen: list[Example] = []
    for microbatch in range((step - 1) * microbatches, step * microbatches):
        chosen = batch_at(data.buckets, training.batch_size, training.seed, microbatch)
        seen += [data.examples[i] for i in chosen]
    return seen


def _has_finite_latents(example: Example) -> bool:
    tensors = [tensor for view in example.views for tensor in (view.mean, view.std)]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def apply_fallback(session: Session, fallback: str) -> bool:
    """Applies a fallback to the model or the optimiser. Returns whether that was possible."""
    predict, denoiser = session.model.predict, session.model.base.denoiser
    if isinstance(predict, GraphedPredict):
        predict.release()  # the graphs were recorded from the model as it was
    if fallback == oom_fallbacks.CHECKPOINT and not denoiser.is_gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        return True
    if fallback == oom_fallbacks.EIGHT_BIT:
        return _use_8bit_optimizer(session)
    return False


def _use_8bit_optimizer(session: Session) -> bool:
    """Replaces AdamW by its 8-bit version, if it works on this machine."""
    optimisation = session.optimisation
    is_alone = session.world.size == 1  # other ranks would keep taking the 32-bit steps
    is_adamw = session.run.training.optimizer == "adamw"
    if optimisation.is_8bit_fallback or not is_adamw or not is_alone:
        return False
    run = replace(session.run, {"training.optimizer": "adamw8bit"})
    try:
        try_optimizer(run, session.device)
    except (ImportError, OSError, RuntimeError, ConfigError):
        return False
    optimisation.optimizer = optimizer_for(run, optimisation.groups, session.device, session.log)
    optimisation.is_8bit_fallback = True
    return True


@contextmanager
def checkpoint_if_a_process_is_lost(
    session: Session, step: int, state: TrainerState
) -> Iterator[None]:
    """Writes a checkpoint of the last whole step if another process ends inside the block."""
    try:
        yield
    except ProcessLost:
        write_checkpoint(session, step, state)
        raise
