"""Out of memory in every phase: the run goes on with the next fallback, at the same step."""

import shutil

import pytest
import torch
from PIL import ImageChops

from tests.tiny import save_tiny_base
from tests.training.helpers import adapter_of, events_of, on_step_done, same, session_of
from trainer import config, families
from trainer.data import latent_cache
from trainer.inference.samples import generate
from trainer.models.device import is_out_of_memory
from trainer.runs import events, run_folder, run_status
from trainer.training import (
    loop,
    oom_fallbacks,
    optimizers,
    setup,
    training_samples,
    validation,
)
from trainer.training.oom_fallbacks import CHECKPOINT, EIGHT_BIT, FREE, SPLIT, TILE
from trainer.training.runner import run_in
from trainer.training.step import optimizer_step

FOREVER = 1000


def run_out(monkeypatch, module, name, times, error=None, only=lambda *given: True):
    """Makes a function run out of memory in its first calls, of those that `only` selects."""
    real, left = getattr(module, name), [times]

    def failing(*given, **named):
        if left[0] and only(*given):
            left[0] -= 1
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*given, **named)

    monkeypatch.setattr(module, name, failing)


def applied(folder):
    """Returns the fallbacks of a run as (phase, step, fallback)."""
    found = events_of(folder, events.MemoryRelieved)
    return [(event.phase, event.step, event.rung) for event in found]


@pytest.fixture
def stand_in_for_8_bits(monkeypatch):
    """Replaces 8-bit AdamW, which needs a GPU, by an optimiser of another class."""
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw8bit", lambda run: torch.optim.Adam)


@pytest.mark.parametrize(
    ("module", "name", "times", "expected"),
    [
        (setup, "load_base", 1, [("load", 0, FREE)]),
        (latent_cache, "encode_image", 2, [("cache", 0, FREE), ("cache", 0, TILE)]),
        (validation, "validation_losses", 2, [("validate", 0, FREE), ("validate", 0, SPLIT)]),
        (training_samples, "generate", 2, [("sample", 0, FREE), ("sample", 0, TILE)]),
        (optimizer_step, "microbatch_losses", 1, [("step", 1, FREE)]),
        (
            optimizer_step,
            "microbatch_losses",
            3,
            [("step", 1, FREE), ("step", 1, CHECKPOINT), ("step", 1, SPLIT)],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_phase_continues_with_the_next_fallback(
    train_tiny, monkeypatch, module, name, times, expected
):
    run_out(monkeypatch, module, name, times)
    folder = train_tiny()
    assert applied(folder) == expected
    status = run_status.read_status(folder)
    assert status.step == len(status.losses) == 6
    assert len(status.samples) == 3
    last = oom_fallbacks.DESCRIPTIONS[expected[-1][2]]
    assert any(last in warning for warning in status.warnings)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["host", "torch"],
)
def test_host_memory_errors_use_the_same_fallbacks(train_tiny, monkeypatch, error):
    run_out(monkeypatch, optimizer_step, "microbatch_losses", 2, error)
    assert applied(train_tiny()) == [("step", 1, FREE), ("step", 1, CHECKPOINT)]


def test_other_errors_use_no_fallback(tiny_run, monkeypatch):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    run_out(monkeypatch, optimizer_step, "microbatch_losses", 1, error)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    assert not applied(folder)
    assert not is_out_of_memory(OSError("x"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (setup, "load_base"),
        (latent_cache, "encode_image"),
        (optimizer_step, "microbatch_losses"),
    ],
)
def test_after_the_last_fallback_the_run_fails_with_advice_and_can_be_resumed(
    tiny_run, monkeypatch, module, name
):
    folder = run_folder.create(tiny_run())
    with monkeypatch.context() as patch:
        run_out(patch, module, name, FOREVER)
        assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert "ran out of memory" in status.message
    assert "dataset.resolution to 16" in status.message
    assert status.can_resume
    assert run_in(folder) == 0
    assert run_status.read_status(folder).state == "finished"


@pytest.mark.usefixtures("stand_in_for_8_bits")
def test_the_last_fallback_is_an_8_bit_optimiser(train_tiny, monkeypatch):
    """The run goes on with it, and is resumed with it."""
    run_out(monkeypatch, optimizer_step, "microbatch_losses", 4)
    folder = train_tiny()
    expected = [("step", 1, fallback) for fallback in (FREE, CHECKPOINT, SPLIT, EIGHT_BIT)]
    assert applied(folder) == expected
    shutil.rmtree(max((folder / "state").iterdir()))
    assert run_in(folder) == 0
    assert applied(folder) == expected


def test_samples_and_validation_that_never_fit_do_not_end_the_run(train_tiny, monkeypatch):
    run_out(monkeypatch, training_samples, "generate", FOREVER)
    run_out(monkeypatch, validation, "validation_losses", FOREVER)
    status = run_status.read_status(train_tiny())
    assert status.state == "finished"
    assert not status.samples
    assert not status.validations


def test_out_of_memory_while_loading_is_not_reported_as_damage(tiny_run, monkeypatch):
    from diffusers import StableDiffusionPipeline

    run_out(monkeypatch, StableDiffusionPipeline, "from_pretrained", 1)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 0
    assert applied(folder) == [("load", 0, FREE)]


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd35-medium"])
def test_samples_from_encoded_prompts_need_no_text_encoder(tiny_run, tmp_path, monkeypatch, kind):
    """They are the same images as with the text encoders."""
    changes = {
        "base.model": str(save_tiny_base(tmp_path / "base", kind=kind)),
        "training.text_encoder_learning_rate": 0,
        "dataset.trigger": "zorbit",
        "sampling.prompts": ["zorbit, red"],
    }
    session = session_of(tiny_run(changes))
    base = session.model.base
    settings = {
        "prompt": "zorbit, red",
        "negative_prompt": "",
        "seed": 1,
        "inference_steps": 2,
        "guidance_scale": 3.0,
    }
    with_encoders = generate(base, **settings)
    for part in base.family.text_encoders(base.pipe).values():
        monkeypatch.setattr(part, "forward", None)
    without_encoders = generate(base, **settings, texts=session.data.texts)
    difference = ImageChops.difference(with_encoders, without_encoders)
    assert max(high for _, high in difference.getextrema()) <= 1
    training_samples.draw_samples(session, 0)
    status = run_status.read_status(session.folder)
    assert len(status.samples) == 1
    assert status.probes
    assert not status.warnings


def test_vae_tiles_are_smaller_than_its_own_image_size(tiny_base, monkeypatch):
    """diffusers' default tiles are as large as those images, and so save nothing on them."""
    vae = families.load_base(config.Base(model=str(tiny_base)), torch.float32).pipe.vae
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    decode, sides = vae.decoder.forward, []

    def recording(latents):
        sides.append(latents.shape[-1])
        return decode(latents)

    monkeypatch.setattr(vae.decoder, "forward", recording)
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = vae.decode(latents).sample
        oom_fallbacks.set_tiling(vae, True)
        tiled = vae.decode(latents).sample
        oom_fallbacks.set_tiling(vae, False)
        again = vae.decode(latents).sample
    assert torch.equal(again, whole)
    first, *tiles, last = sides
    assert first == last == side
    assert len(tiles) > 3
    assert max(tiles) == side // 2
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


def test_a_split_microbatch_has_the_same_gradients(tiny_run):
    """Images, noise and timesteps are the same, so gradients differ only by rounding."""
    run = tiny_run(
        {
            "training.batch_size": 4,
            "dataset.repeats": [". = 2"],  # two images of each shape, twice
            "dataset.caption_dropout": 0.5,
            "training.text_encoder_learning_rate": 1e-3,
        }
    )
    session = session_of(run)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    results = []
    for pieces in (1, 2, 4, 8):
        session.fallbacks.pieces["step"] = pieces
        loss = loop.forward_backward(session, 1, scaler)
        parameters = session.optimisation.parameters.values()
        results.append((loss, torch.cat([p.grad.flatten() for p in parameters])))
    whole_loss, whole_gradients = results[0]
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
        error = (gradients - whole_gradients).norm() / whole_gradients.norm()
        assert float(error) < 1e-5


def test_a_split_validation_gives_the_same_losses(tiny_run):
    session = session_of(tiny_run())
    whole = validation.validation_losses(session)
    session.fallbacks.pieces["validate"] = 8
    assert validation.validation_losses(session) == pytest.approx(whole, rel=1e-6)


def test_a_resumed_run_applies_fallbacks_again_at_the_same_step(tiny_run, monkeypatch):
    """Interrupted or not, the run gives the same adapter, though the resumed one has memory."""
    changes = {"adapter.dropout": 0.3, "saving.precision": "fp32"}

    def of_step_4(session, microbatch, *piece):
        return microbatch == 3

    def die():
        raise ZeroDivisionError

    whole, interrupted = (run_folder.create(tiny_run(changes)) for _ in range(2))
    with monkeypatch.context() as patch:
        run_out(patch, optimizer_step, "microbatch_losses", 3, only=of_step_4)
        assert run_in(whole) == 0
    with monkeypatch.context() as patch:
        run_out(patch, optimizer_step, "microbatch_losses", 3, only=of_step_4)
        on_step_done(patch, 4, die)
        assert run_in(interrupted) == 1
    assert max(int(state.name) for state in (interrupted / "state").iterdir()) == 3
    assert run_in(interrupted) == 0
    expected = [("step", 4, fallback) for fallback in (FREE, CHECKPOINT, SPLIT)]
    assert applied(interrupted) == applied(whole) == expected
    assert same(adapter_of(interrupted), adapter_of(whole))


@pytest.mark.usefixtures("stand_in_for_8_bits")
def test_a_rollback_behind_a_fallback_keeps_the_fallback(tiny_run, monkeypatch):
    """Step 3 applies every fallback, and steps 4 to 6 are not finite.

    The run goes back to the checkpoint of step 2, which was written before the fallbacks.
    Interrupted or not, it gives the same adapter.
    """
    changes = {"adapter.dropout": 0.3, "saving.precision": "fp32", "training.steps": 8}
    whole, interrupted = (run_folder.create(tiny_run(changes)) for _ in range(2))
    with monkeypatch.context() as patch:
        trouble_steps_3_to_6(patch)
        assert run_in(whole) == 0
    with monkeypatch.context() as patch:
        trouble_steps_3_to_6(patch)
        die_after_rollback(patch)
        assert run_in(interrupted) == 1
    warnings = run_status.read_status(interrupted).warnings
    assert any("went back to step 2" in warning for warning in warnings)
    assert run_in(interrupted) == 0
    expected = [("step", 3, fallback) for fallback in oom_fallbacks.FALLBACKS_BY_PHASE["step"]]
    assert applied(interrupted) == applied(whole) == expected
    assert same(adapter_of(interrupted), adapter_of(whole))


def trouble_steps_3_to_6(monkeypatch):
    """Makes calls 3 to 6 run out of memory, and calls 9 to 14 (two per step) return NaN."""
    real, calls = optimizer_step.microbatch_losses, iter(range(1, 1000))

    def troubled(*given):
        call = next(calls)
        if 3 <= call <= 6:
            raise torch.OutOfMemoryError("out of memory")
        factor = float("nan") if 9 <= call <= 14 else 1.0
        return (factor * loss for loss in real(*given))

    monkeypatch.setattr(optimizer_step, "microbatch_losses", troubled)


def die_after_rollback(monkeypatch):
    """Ends the run with an error at the first step after a rollback."""
    append, seen = events.EventLog.append, []

    def append_and_die(self, event):
        append(self, event)
        seen.append(type(event))
        if isinstance(event, events.StepDone) and events.RolledBack in seen:
            raise ZeroDivisionError

    monkeypatch.setattr(events.EventLog, "append", append_and_die)


@pytest.mark.parametrize(
    ("resolution", "smaller"), [(768, 576), (512, 384), (64, 32), (32, 16), (16, 16)]
)
def test_advice_names_smaller_settings(resolution, smaller):
    changes = {"dataset.resolution": resolution, "dataset.bucket_step": 8, "adapter.rank": 8}
    run = config.replace(config.RunConfig(), changes)
    advice = oom_fallbacks.advice(run)
    assert f"dataset.resolution to {smaller} or adapter.rank to 4" in advice
    rank_1 = config.replace(run, {"adapter.rank": 1})
    assert "rank" not in oom_fallbacks.advice(rank_1)
