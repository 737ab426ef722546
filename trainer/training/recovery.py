"""Resuming, rolling back, and what a run does when memory runs out."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.config import fingerprint, replace
from trainer.data.sampler import batch_at
from trainer.errors import ConfigError, NotLearning, ProcessLost
from trainer.runs.events import (
    RolledBack,
    StepDone,
    Warned,
)
from trainer.training import oom_fallbacks
from trainer.training.optimizers import (
    restore_optimizer,
    try_optimizer,
)
from trainer.training.saving import keep_state
from trainer.training.session import Session, optimizer_for
from trainer.training.step.cuda_graphs import GraphedPredict
from trainer.training.step.optimizer_step import PendingStep
from trainer.training.trainer_state import (
    State,
    check_unchanged,
    load_state,
    restore_parameters,
)
from trainer.training.validation import fixed_losses

BAD_STEPS_IN_A_ROW = 3  # then the run goes back to its last good state

ROLLBACKS = 2  # then it stops

LOWER = 0.5  # what the learning rate is multiplied with at each


def restore(session: Session) -> tuple[dict, int]:
    """Puts the last state into the session. Returns what is stored along with it, and its step."""
    facts = {
        "config": fingerprint(session.run),
        "dataset": session.dataset_fingerprints(),
        "started": time.time(),
        "elapsed": 0.0,
        "loss_scale": 2.0**16,
        "lr_scale": 1.0,
        "rollbacks": 0,
        "bad_steps": 0,
    }
    state, passed_over = load_state(session.folder)
    for sentence in passed_over:
        session.log.append(Warned(sentence))
    if state is None:
        return facts, 0
    check_unchanged(state.facts, facts)
    session.fallbacks.catch_up("step", state.step)  # it may have changed the optimiser
    load_into(session, state)
    return facts | state.facts, state.step


def load_into(session: Session, state: State) -> None:
    restore_parameters(session.kept, state.adapter)
    if session.eight_bit and state.facts["optimizer"]["class"] != type(session.optimizer).__name__:
        session.optimizer.state.clear()  # the state is of before the measure, which begins this memory anew
    else:
        restore_optimizer(session.optimizer, state.optimizer, state.facts["optimizer"])
    if session.average:
        session.average.shadow_params = [
            state.average[name].to(session.device) for name in session.parameters
        ]
        session.average.optimization_step = state.facts["averaged_steps"]


def report_finished_steps(
    session: Session,
    buckets: list[list[int]],
    taken: list[PendingStep],
    facts: dict,
    leaving: int = 0,
) -> None:
    """Tells how the steps went, but for the newest `leaving`, and counts those in a row that were not finite."""
    while len(taken) > leaving and facts["bad_steps"] < BAD_STEPS_IN_A_ROW:
        done = taken.pop(0)
        loss, finite = done.outcome.values()
        end = time.monotonic()
        if finite:
            facts["bad_steps"] = 0
        elif not (math.isfinite(loss) and done.may_overflow):
            facts["bad_steps"] += 1
        if not facts["bad_steps"]:
            session.log.append(StepDone(done.step, loss, done.learning_rate, end - done.begun))
        elif facts["bad_steps"] < BAD_STEPS_IN_A_ROW:
            cause = find_cause(session, buckets, done.step)
            session.log.append(
                Warned(
                    f"Step {done.step} was skipped: its loss or gradients were not finite. {cause}"
                )
            )
        for later in taken:
            later.begun = end


def finite_weights(session: Session) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in session.parameters.values())


def roll_back(session: Session, buckets: list[list[int]], step: int, facts: dict) -> int:
    """Puts the last good state back and lowers the learning rate; returns its step. Raises NotLearning with the cause after some times.

    What was decided goes into the facts, and with them into the state: a resumed run goes the same way.
    """
    cause = find_cause(session, buckets, step)
    state, _ = load_state(session.folder, lambda state: not state.facts.get("bad_steps"))
    if state is None or facts["rollbacks"] >= ROLLBACKS:
        raise NotLearning(
            f"The numbers of the training were not finite any more, up to step {step}. {cause} The last state is kept."
        )
    session.world.meet()  # all have read it; it is written anew next
    load_into(session, state)
    facts |= {
        "lr_scale": facts["lr_scale"] * LOWER,
        "rollbacks": facts["rollbacks"] + 1,
        "bad_steps": 0,
    }
    # Told before the state is written: from it a resumed run knows which measures against want of memory that state was kept with.
    session.log.append(
        RolledBack(
            state.step,
            step,
            facts["lr_scale"],
            f"The numbers were not finite up to step {step}, so the training went back to step {state.step} and goes on with "
            f"{facts['lr_scale']:g} times the learning rate. {cause}",
        )
    )
    keep_state(session, state.step, facts)
    return state.step


def find_cause(session: Session, buckets: list[list[int]], step: int) -> str:
    """What made the numbers of a step not finite, told by its pictures on the base without the adapter; and what to do."""
    training = session.run.training
    parts = range(
        (step - 1) * training.gradient_accumulation_steps,
        step * training.gradient_accumulation_steps,
    )
    seen = [
        session.examples[i]
        for part in parts
        for i in batch_at(buckets, training.batch_size, training.seed, part)
    ]
    for module in session.components.values():
        module.disable_adapters()
    try:
        for example in seen:
            if not all(
                torch.isfinite(tensor).all()
                for view in example.views
                for tensor in (view.mean, view.std)
            ):
                return f"The latents of {example.name} are not finite: save that picture anew, or leave it out."
            if not torch.isfinite(fixed_losses(session, example)).all():
                return (
                    f"The base itself gives no finite numbers for {example.name} in {session.precision}: "
                    + (
                        "leave that picture out."
                        if session.precision == "fp32"
                        else "use base.precision = fp32, or leave that picture out."
                    )
                )
    finally:
        for module in session.components.values():
            module.enable_adapters()
    return f"Lower the learning rate (now {training.learning_rate:g}), or use base.precision = fp32 (now {session.precision})."


def apply_fallback(session: Session, rung: str) -> bool:
    """Takes a measure of the fallbacks against want of memory on the model; whether that was possible."""
    denoiser = session.base.denoiser
    if isinstance(session.predict, GraphedPredict):
        session.predict.release()  # of the model as it was
    if rung == oom_fallbacks.CHECKPOINT and not denoiser.is_gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        return True
    alone = session.world.size == 1  # all must take the same steps
    if (
        rung == oom_fallbacks.EIGHT_BIT
        and session.run.training.optimizer == "adamw"
        and alone
        and not session.eight_bit
    ):
        smaller = replace(session.run, {"training.optimizer": "adamw8bit"})
        try:
            try_optimizer(smaller, session.device)
        except (ImportError, OSError, RuntimeError, ConfigError):  # not on this machine
            return False
        session.optimizer = optimizer_for(smaller, session.groups, session.device, session.log)
        session.eight_bit = True
        return True
    return False


@contextmanager
def keeping_the_last_whole_step(session: Session, step: int, facts: dict) -> Iterator[None]:
    """Where another process of the training ends in the block, the state of a step is kept before the run ends too."""
    try:
        yield
    except ProcessLost:
        keep_state(session, step, facts)
        raise
