"""The training: one visible loop, and what it does at each of its stations."""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from trainer.config import RunConfig, fingerprint, replace
from trainer.data import latent_cache
from trainer.data.augment import without_trigger
from trainer.data.sampler import batch_at
from trainer.errors import ConfigError, NotLearning, OutOfMemory, ProcessLost
from trainer.inference import sample_checks
from trainer.inference.samples import generate, sampler_name, save_sample
from trainer.lora import analysis, inject, metadata, textual_inversion, writer
from trainer.lora.formats.reader import read_adapter
from trainer.models.device import DTYPES, AsyncScalars, device_name
from trainer.models.model_files import DENOISERS
from trainer.runs import convergence, events, run_folder, run_requests, run_status
from trainer.runs.events import (
    AdapterSaved,
    Continued,
    EndedEarly,
    EventLog,
    Finished,
    Paused,
    Probed,
    Progress,
    RolledBack,
    SampleSaved,
    Started,
    StateSaved,
    StepDone,
    Stopped,
    Validated,
    Warned,
)
from trainer.training import estimate, oom_fallbacks
from trainer.training.cuda_graphs import GraphedPredict
from trainer.training.distributed import World
from trainer.training.optimizers import (
    lr_factor,
    optimizer_state,
    restore_optimizer,
    set_learning_rate,
    try_optimizer,
)
from trainer.training.setup import Session, optimizer_for, prepare, sample_prompts
from trainer.training.step import (
    VALIDATION_TIMESTEPS,
    fixed_losses,
    microbatch_losses,
    training_loss,
    validation_losses,
)
from trainer.training.trainer_state import (
    State,
    check_unchanged,
    load_state,
    restore_parameters,
    save_state,
)

BAD_STEPS_IN_A_ROW = 3  # then the run goes back to its last good state
ROLLBACKS = 2  # then it stops
LOWER = 0.5  # what the learning rate is multiplied with at each
SMALLEST_LOSS_SCALE = 2.0**-10  # of fp16; gradients that overflow even so are no accident


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


def started_event(session: Session, step: int) -> Started:
    return Started(
        step=step,
        total_steps=session.total_steps,
        pictures=len(names := {e.name for e in session.examples}),
        held_out=len({e.name for e in session.held_out} - names),
        trainable_parameters=sum(p.numel() for p in session.parameters.values()),
        parameters={
            name: sum(p.numel() for p in inject.trainable(module).values())
            for name, module in session.components.items()
        },
        base_parameters={
            name: estimate.base_parameters(session.base.files, name) for name in session.components
        },
        device=f"{session.world.size} x " * (session.world.size > 1) + device_name(session.device),
        precision=session.precision,
        attention=session.attention,
        family=session.base.family.name,
        saves=session.run.saving.saves,
        images_per_step=session.run.training.batch_size
        * session.run.training.gradient_accumulation_steps,
    )


def forward_backward(
    session: Session, buckets: list[list[int]], step: int, scaler: torch.amp.GradScaler
) -> torch.Tensor:
    """Sums the gradients of this process's share of the microbatches of a step. Returns its share of their mean loss, without gradients."""
    count, splits = (
        session.run.training.gradient_accumulation_steps,
        session.fallbacks.pieces["step"],
    )
    clear_gradients(session)  # of a try that ran out of memory
    for parameter in (
        p
        for name, group in session.groups.items()
        if not session.learns(name, step)
        for p in group.values()
    ):
        parameter.grad = None  # on zeros the optimiser would go on moving it by its momentum
    for name, module in session.components.items():
        module.train(session.learns(name, step))
    total = torch.zeros((), device=session.device)
    for part, piece, pieces in session.world.shares(count):
        for split in range(splits):
            losses = microbatch_losses(
                session, buckets, (step - 1) * count + part, piece * splits + split, pieces * splits
            )
            while True:
                with keeping_activations(session):
                    loss = next(losses, None)
                if loss is None:
                    break
                scaler.scale(loss / count).backward()
                total += loss.detach() / count
    for module in session.components.values():
        module.eval()
    return total


def keeping_activations(session: Session) -> AbstractContextManager:
    """Where the forward pass leaves what the backward pass needs."""
    if not session.run.training.activation_offload:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=session.device.type == "cuda")


def clear_gradients(session: Session) -> None:
    session.optimizer.zero_grad(
        set_to_none=session.device.type != "cuda"
    )  # there GraphedPredict needs them to stay


def finite_gradients(session: Session, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Unscales and clips the gradients; whether they are numbers, a bool scalar on the device."""
    scaler.unscale_(session.optimizer)
    limit = session.run.training.max_grad_norm or float("inf")
    return torch.isfinite(torch.nn.utils.clip_grad_norm_(session.parameters.values(), limit))


@dataclass
class PendingStep:
    """A step whose numbers may not have reached the host yet."""

    step: int
    begun: float
    """By the monotonic clock; the end of the step before, where the host was ahead."""
    learning_rate: float
    outcome: AsyncScalars
    """The loss; whether it and the gradients were finite."""
    may_overflow: bool
    """The scaler of fp16 meets its limit by overflowing now and then."""


def runs_ahead(session: Session, scaler: torch.amp.GradScaler) -> bool:
    """Whether the host launches a step before it knows how the last one ended, so that the device never waits for it.

    That takes an optimiser that leaves out a step by itself: torch's fused ones do, as for a gradient scaler.
    """
    leaves_out = (
        getattr(session.optimizer, "_step_supports_amp_scaling", False)
        and not scaler.is_enabled()
        and not session.average
    )
    return leaves_out and session.device.type == "cuda" and session.world.size == 1


def optimizer_step(
    session: Session,
    scaler: torch.amp.GradScaler,
    step: int,
    begun: float,
    learning_rate: float,
    loss: torch.Tensor,
    finite: torch.Tensor,
) -> PendingStep:
    """Moves the weights where the numbers are finite, and clears the gradients. Where the host runs ahead, nothing waits for the device."""
    ahead = runs_ahead(session, scaler)
    if ahead:
        session.optimizer.found_inf = (~finite).float()
        session.optimizer.step()
    elif finite:
        scaler.step(session.optimizer)
    if ahead or finite:
        if session.run.adapter.max_norm:
            inject.cap_norms(session.components.values(), session.run.adapter.max_norm)
        if session.average:
            session.average.step(session.parameters.values())
    may_overflow = scaler.is_enabled() and scaler.get_scale() > SMALLEST_LOSS_SCALE
    scaler.update()
    clear_gradients(session)
    return PendingStep(step, begun, learning_rate, AsyncScalars(loss, finite), may_overflow)


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


def check_gradients_arrive(session: Session, step: int) -> None:
    """In the first step only B has a gradient (B is zero, so A has none); a broken attention backward gives none at all.

    That of a text encoder may be zero where captions are dropped: some families put zeros in their place. Where layers or ranks are
    left out by chance, all of them may be, so nothing can be told.
    """
    if session.run.adapter.module_dropout or session.run.adapter.rank_dropout:
        return
    dropping = session.run.dataset.caption_dropout > 0
    for part, module in session.components.items():
        gradients = [p.grad for name, p in inject.trainable(module).items()]
        arrived = any(
            g is not None and (bool(g.any()) or (dropping and part not in DENOISERS))
            for g in gradients
        )
        if session.learns(part, step) and not arrived:
            raise NotLearning(
                f"No gradient reached the adapter in the {part}, so nothing can be learned. "
                f"The attention in use ({session.attention}) gives a wrong backward pass, or the settings freeze everything."
            )


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


@contextmanager
def keeping_the_last_whole_step(session: Session, step: int, facts: dict) -> Iterator[None]:
    """Where another process of the training ends in the block, the state of a step is kept before the run ends too."""
    try:
        yield
    except ProcessLost:
        keep_state(session, step, facts)
        raise


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


def measure(session: Session, step: int) -> float | None:
    """The validation loss; None, with a warning, where it needs more memory than there is."""
    session.fallbacks.catch_up("validate", step)
    try:
        parts = session.fallbacks.attempt(
            "validate", step, lambda: validation_losses(session), VALIDATION_TIMESTEPS
        )
        compared = session.fallbacks.attempt(
            "validate", step, lambda: training_loss(session), VALIDATION_TIMESTEPS
        )
    except OutOfMemory:
        session.log.append(
            Warned(
                f"The validation loss of step {step} could not be measured for want of memory; the training goes on."
            )
        )
        return None
    loss = fmean(parts)
    session.log.append(Validated(step, loss, parts, compared))
    return loss


def ends_early(session: Session, step: int, saves: Sequence[int]) -> bool:
    """Whether the held-out loss has not fallen for as many saves as the settings allow. A save that a person asked for does not count,
    so that asking alters nothing; what was measured is read from the events, so that a resumed run decides alike."""
    patience = session.run.training.early_stop
    if not patience or step not in saves:
        return False
    status = run_status.read_status(session.folder)
    measured = [point for point in status.measured if point.step in saves]
    if not session.world.agree(
        bool(status.started and status.started.held_out)
        and convergence.has_run_dry(measured, patience)
    ):
        return False
    best = status.best_step or step
    session.log.append(
        EndedEarly(
            step,
            best,
            f"The loss on the held-out pictures has not fallen for {patience} saves, so the run ended at step {step} of "
            f"{session.total_steps}. The best save is that of step {best}.",
        )
    )
    return True


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
        path = run_folder.embedding_of(session.folder / next(iter(names.values())))
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
    return files + ([run_folder.embedding_of(files[0])] if session.trigger else [])


def sample(session: Session, step: int) -> None:
    """One picture a prompt, and what they give away. A failure here is a warning: the training itself is fine."""
    chosen, pipe, side = session.run.sampling, session.base.pipe, session.run.dataset.resolution
    text_encoders = (
        session.base.family.text_encoders(pipe).values() if session.texts is None else ()
    )
    homes = {part: part.device for part in (pipe.vae, *text_encoders)}
    prompts, drawn = sample_prompts(session.run, session.examples), []
    session.fallbacks.catch_up("sample", step)

    def draw(settings: dict) -> Image.Image:
        oom_fallbacks.set_tiling(pipe.vae, chosen.vae_tiling or "sample" in session.fallbacks.tiled)
        for part in homes:
            part.to(session.device)
        return generate(
            session.base,
            **settings,
            width=side,
            height=side,
            sampler=chosen.sampler,
            texts=session.texts,
        )

    def make(prompt: str, seed: int, file: str) -> Image.Image:
        settings: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": chosen.negative_prompt,
            "seed": seed,
            "inference_steps": chosen.inference_steps,
            "guidance_scale": chosen.guidance_scale,
        }
        image = session.fallbacks.attempt("sample", step, partial(draw, settings))
        save_sample(
            session.folder / file,
            image,
            **settings,
            sampler=sampler_name(pipe, chosen.sampler),
            note=f"Step: {step}",
        )
        return image

    try:
        for index, prompt in enumerate(prompts):
            session.log.append(Progress("sampling", index, len(prompts)))
            file = sample_file(step, index)
            drawn.append(make(prompt, chosen.seed + index, file))
            session.log.append(SampleSaved(step, prompt, chosen.seed + index, file))
        session.log.append(probed(session, step, prompts[0], drawn, make))
    except (
        Exception
    ) as error:  # whatever it is, the training itself is fine; the log has the details
        traceback.print_exc()
        what = f"The samples of step {step} could not all be made and measured"
        session.log.append(Warned(f"{what} ({str(error)[:200]}); the training goes on."))
    finally:
        for part, home in homes.items():
            part.to(home)


def sample_file(step: int, name: int | str) -> str:
    return f"samples/{step:06d}-{name}{run_folder.SAMPLE_SUFFIX}"


def probed(
    session: Session,
    step: int,
    prompt: str,
    drawn: Sequence[Image.Image],
    make: Callable[[str, int, str], Image.Image],
) -> Probed:
    """Draws the first prompt without its trigger and compares it with the base's; how near the samples come to the training pictures."""
    dataset, seed = session.run.dataset, session.run.sampling.seed
    facts: dict[str, Any] = {}
    without = without_trigger(prompt, dataset)
    if without != prompt:
        picture = make(without, seed, sample_file(step, "without"))
        facts = {"prompt": without, "seed": seed, "file": sample_file(step, "without")}
        of_base = [session.folder / sample_file(0, name) for name in (0, "without")]
        if step and all(path.is_file() for path in of_base):
            first, second = (Image.open(path) for path in of_base)
            facts["leak"] = sample_checks.leak((first, drawn[0]), (second, picture))
    pictures = [
        example.mean for example in session.examples if example.resolution == dataset.resolution
    ]
    if found := sample_checks.likeness(
        sample_checks.latents_of(session.base.pipe, drawn), pictures
    ):
        facts |= {"likeness": found[0], "likeness_between": found[1]}
    return Probed(step, **facts)


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
