"""The training loop, as one visible function."""

import time
from functools import partial
from pathlib import Path

import torch

from trainer.config import RunConfig
from trainer.runs import events, run_requests
from trainer.runs.events import Continued, EventLog, Paused
from trainer.training import estimate, oom_fallbacks, recovery, saving, training_samples, validation
from trainer.training.distributed import World
from trainer.training.lr_schedules import lr_factor, set_learning_rate
from trainer.training.recovery import checkpoint_if_a_process_is_lost, report_finished_steps
from trainer.training.session import Session, started_event
from trainer.training.setup import prepare
from trainer.training.step.optimizer_step import (
    PendingStep,
    check_gradients_arrive,
    clip_gradients,
    forward_backward,
    optimizer_step,
)
from trainer.training.trainer_state import TrainerState


def train(run: RunConfig, folder: Path, log: EventLog, world: World | None = None) -> Path:
    """Trains a run from its start or its newest checkpoint. Returns the chosen adapter file.

    In distributed training every process runs this loop and takes the same branches. Only rank 0
    writes files. Raises TrainerError.
    """
    # Set up. A resumed run applies its earlier memory fallbacks again, each at its step.
    world = world or World()
    earlier = oom_fallbacks.earlier_fallbacks(events.read_events(folder / "events.jsonl"))
    fallbacks = oom_fallbacks.Fallbacks(run, log, earlier)
    session = prepare(run, folder, log, fallbacks, world)
    fallbacks.apply_to_model = partial(recovery.apply_fallback, session)
    state, step = recovery.restore(session)
    first_step = step + 1
    clock = time.monotonic() - state.elapsed
    save_steps = estimate.save_steps(session.total_steps, run.saving.saves)
    scaler = torch.amp.GradScaler(
        session.device.type, enabled=session.precision == "fp16", init_scale=state.loss_scale
    )
    log.append(started_event(session, step))

    # Validate and sample before the first step: every save is compared to this.
    if step == 0 and world.is_main:
        validation.validate(session, 0)
        training_samples.draw_samples(session, 0)

    pending: list[PendingStep] = []
    while True:
        # Is this the end? All ranks must agree, or one would wait for the others forever.
        with checkpoint_if_a_process_is_lost(session, step, state):
            is_last = step == session.total_steps or world.agree(
                run_requests.requested(folder, "stop")
            )
        is_save = step in save_steps or is_last
        is_checkpoint = is_save or step % run.saving.state_every == 0

        # Wait for the results of finished steps, so that whatever follows is reported after them.
        if pending and (is_checkpoint or has_request(folder)):
            report_finished_steps(session, pending, state)

        # Roll back if numbers are not finite. Weights are checked before they are written.
        if recovery.must_roll_back(session, state, is_checkpoint):
            step = recovery.roll_back(session, step - len(pending), state)
            pending.clear()
            continue

        # Checkpoint. After a skipped step only the end writes one: a rollback loads the newest.
        if is_checkpoint and (is_last or not state.bad_steps):
            state.elapsed = time.monotonic() - clock
            state.loss_scale = scaler.get_scale() or 1.0
            saving.write_checkpoint(session, step, state)

        # Save the adapter.
        if step and is_save and world.is_main:
            with saving.final_weights(session):
                saving.save_adapter(session, step, state)
                training_samples.draw_samples(session, step)
        if is_last or validation.ends_early(session, step, save_steps):
            break

        # Answer the user.
        if step and world.is_main:
            answer_requests(session, step, state)
        with checkpoint_if_a_process_is_lost(session, step, state):
            wait_while_paused(session, step)

        # Forward and backward.
        step += 1
        begun = time.monotonic()
        fallbacks.catch_up("step", step)
        factor = state.lr_scale * lr_factor(run, step, session.total_steps)
        learning_rate = set_learning_rate(session.optimisation.optimizer, factor)
        work = partial(forward_backward, session, step, scaler)
        loss = fallbacks.attempt("step", step, work, run.training.batch_size)
        with checkpoint_if_a_process_is_lost(session, step - 1, state):
            loss = world.sum_gradients(list(session.optimisation.parameters.values()), loss)

        # Update the weights. A loss of exactly 0 has no gradients to check: at the end of some
        # noise schedules its weight is 0.
        finite = clip_gradients(session, scaler) & torch.isfinite(loss)
        if step == first_step and finite and loss:
            check_gradients_arrive(session, step)
        done = optimizer_step(session, scaler, step, begun, learning_rate, loss, finite)
        pending.append(done)
        report_finished_steps(session, pending, state, leave=int(done.is_ahead))

    if not world.is_main:
        return folder
    with saving.final_weights(session):
        return saving.finish(session, step, clock)


def has_request(folder: Path) -> bool:
    return any(run_requests.requested(folder, what) for what in ("save", "sample", "pause"))


def answer_requests(session: Session, step: int, state: TrainerState) -> None:
    """Saves or samples between the planned saves, if the user asks for it.

    Neither changes the training.
    """
    is_save = run_requests.take(session.folder, "save")
    is_sample = run_requests.take(session.folder, "sample")
    if not (is_save or is_sample):
        return
    with saving.final_weights(session):
        if is_save:
            saving.save_adapter(session, step, state)
        if is_sample:
            training_samples.draw_samples(session, step)


def wait_while_paused(session: Session, step: int) -> None:
    """Waits as long as the user asks for a pause, unless the user asks for a stop."""

    def is_paused() -> bool:
        wants_pause = run_requests.requested(session.folder, "pause")
        wants_stop = run_requests.requested(session.folder, "stop")
        return session.world.agree(wants_pause and not wants_stop)

    if not is_paused():
        return
    session.log.append(Paused(step))
    while is_paused():
        time.sleep(0.2)
    session.log.append(Continued(step))
