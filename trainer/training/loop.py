"""The training: one visible loop, and what it does at each of its stations."""

import time
from functools import partial
from pathlib import Path

import torch

from trainer.config import RunConfig
from trainer.runs import events, run_requests
from trainer.runs.events import (
    Continued,
    EventLog,
    Paused,
)
from trainer.training import estimate, oom_fallbacks
from trainer.training.distributed import World
from trainer.training.lr_schedules import lr_factor, set_learning_rate
from trainer.training.recovery import (
    BAD_STEPS_IN_A_ROW,
    apply_fallback,
    finite_weights,
    keeping_the_last_whole_step,
    report_finished_steps,
    restore,
    roll_back,
)
from trainer.training.saving import final_weights, finish, keep_adapter, keep_state
from trainer.training.session import Session, started_event
from trainer.training.setup import prepare
from trainer.training.step.optimizer_step import (
    PendingStep,
    check_gradients_arrive,
    finite_gradients,
    forward_backward,
    optimizer_step,
    runs_ahead,
)
from trainer.training.training_samples import sample
from trainer.training.validation import ends_early, measure


def train(run: RunConfig, folder: Path, log: EventLog, world: World | None = None) -> Path:
    """Trains, or goes on from the last state; returns the chosen adapter file. Raises TrainerError.

    Where several processes train as one, all go through this loop and take the same turns in it; only the first one writes.
    """
    world = world or World()
    fallbacks = oom_fallbacks.Fallbacks(
        run, log, oom_fallbacks.earlier(events.read_events(folder / "events.jsonl"))
    )
    session = prepare(run, folder, log, fallbacks, world)
    fallbacks.use = partial(apply_fallback, session)
    facts, step = restore(session)
    clock = time.monotonic() - facts["elapsed"]
    log.append(started_event(session, step))
    saves, buckets, first_step = (
        estimate.save_steps(session.total_steps, run.saving.saves),
        session.buckets,
        step,
    )
    scaler = torch.amp.GradScaler(
        session.device.type, enabled=session.precision == "fp16", init_scale=facts["loss_scale"]
    )
    if step == 0 and world.is_main:
        measure(session, 0)
        sample(session, 0)
    taken: list[PendingStep] = []
    while True:
        # Keep what the last step left.
        with keeping_the_last_whole_step(session, step, facts):
            ending = step == session.total_steps or world.agree(
                run_requests.requested(folder, "stop")
            )
        keeping = step in saves or ending or step % run.saving.state_every == 0
        if taken and (
            keeping
            or any(run_requests.requested(folder, what) for what in ("save", "sample", "pause"))
        ):
            report_finished_steps(session, buckets, taken, facts)
        if facts["bad_steps"] >= BAD_STEPS_IN_A_ROW or (keeping and not finite_weights(session)):
            step = roll_back(session, buckets, step - len(taken), facts)
            taken.clear()
            continue
        if keeping and (ending or not facts["bad_steps"]):
            facts |= {"elapsed": time.monotonic() - clock, "loss_scale": scaler.get_scale() or 1.0}
            keep_state(session, step, facts)
        if step and (step in saves or ending) and world.is_main:
            with final_weights(session):
                keep_adapter(session, step, facts)
                sample(session, step)
        if ending or ends_early(session, step, saves):
            break
        if world.is_main:
            answer_requests(session, step, facts)
        with keeping_the_last_whole_step(session, step, facts):
            wait_while_paused(session, step)

        # One step.
        step += 1
        begin = time.monotonic()
        fallbacks.catch_up("step", step)
        learning_rate = set_learning_rate(
            session.optimizer, facts["lr_scale"] * lr_factor(run, step, session.total_steps)
        )
        loss = fallbacks.attempt(
            "step",
            step,
            partial(forward_backward, session, buckets, step, scaler),
            run.training.batch_size,
        )
        with keeping_the_last_whole_step(session, step - 1, facts):
            loss = world.sum_gradients(list(session.parameters.values()), loss)
        finite = finite_gradients(session, scaler) & torch.isfinite(loss)
        if (
            step == first_step + 1 and finite and loss
        ):  # which is weighed with 0 where a schedule ends without any signal
            check_gradients_arrive(session, step)
        taken.append(optimizer_step(session, scaler, step, begin, learning_rate, loss, finite))
        report_finished_steps(
            session, buckets, taken, facts, leaving=int(runs_ahead(session, scaler))
        )
    if not world.is_main:
        return folder
    with final_weights(session):
        return finish(session, step, clock)


def answer_requests(session: Session, step: int, facts: dict) -> None:
    """What the person asks for between the saves: "save" keeps the adapter, "sample" draws with it. Neither alters the training."""
    if step == 0:
        return
    saving, sampling = (run_requests.take(session.folder, what) for what in ("save", "sample"))
    if saving or sampling:
        with final_weights(session):
            if saving:
                keep_adapter(session, step, facts)
            if sampling:
                sample(session, step)


def wait_while_paused(session: Session, step: int) -> None:
    def is_paused() -> bool:
        return session.world.agree(
            run_requests.requested(session.folder, "pause")
            and not run_requests.requested(session.folder, "stop")
        )

    if not is_paused():
        return
    session.log.append(Paused(step))
    while is_paused():
        time.sleep(0.2)
    session.log.append(Continued(step))
