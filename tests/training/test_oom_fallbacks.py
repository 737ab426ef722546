"""Out of memory at every phase: the run goes on by the next measure of the fallbacks, at the same step, and says so."""

import shutil

import pytest
import torch
from PIL import ImageChops
from safetensors.torch import load_file

from tests.tiny import save_tiny_base
from trainer import config, families
from trainer.data import latent_cache
from trainer.inference.samples import generate
from trainer.runs import events, run_folder, run_status
from trainer.training import (
    loop,
    oom_fallbacks,
    optimizers,
    setup,
    training_samples,
    validation,
)
from trainer.training.oom_fallbacks import CHECKPOINT, FREE, SPLIT, TILE
from trainer.training.runner import run_in
from trainer.training.step import optimizer_step


def failing(monkeypatch, module, name, times, error=None, only=lambda *args: True):
    """Lets a function run out of memory at its first calls."""
    real, left = getattr(module, name), [times]

    def fail(*args, **kwargs):
        if left[0] and only(*args):
            left[0] -= 1
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)


def relieved(folder):
    return [
        (e.phase, e.step, e.rung)
        for e in events.read_events(folder / "events.jsonl")
        if isinstance(e, events.MemoryRelieved)
    ]


def adapter_of(folder):
    return load_file(folder / run_status.read_status(folder).finished.file)


@pytest.mark.parametrize(
    "module, name, times, expected",
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
    failing(monkeypatch, module, name, times)
    folder = train_tiny()
    assert relieved(folder) == expected
    status = run_status.read_status(folder)
    assert status.step == 6 and len(status.losses) == 6 and len(status.samples) == 3
    assert any(oom_fallbacks.DESCRIPTIONS[expected[-1][2]] in warning for warning in status.warnings)


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
    failing(monkeypatch, optimizer_step, "microbatch_losses", 2, error)
    assert relieved(train_tiny()) == [("step", 1, FREE), ("step", 1, CHECKPOINT)]


def test_other_errors_use_no_fallback(tiny_run, monkeypatch):
    failing(
        monkeypatch,
        optimizer_step,
        "microbatch_losses",
        1,
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    )
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1 and not relieved(folder)


@pytest.mark.parametrize(
    "module, name",
    [(setup, "load_base"), (latent_cache, "encode_image"), (optimizer_step, "microbatch_losses")],
)
def test_after_the_last_fallback_the_run_fails_with_advice_and_can_be_resumed(
    tiny_run, monkeypatch, module, name
):
    with monkeypatch.context() as patch:
        failing(patch, module, name, 1000)
        folder = run_folder.create(tiny_run())
        assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert (
        "ran out of memory" in status.message
        and "dataset.resolution to 16" in status.message
        and status.can_resume
    )
    assert run_in(folder) == 0 and run_status.read_status(folder).state == "finished"


def test_the_last_fallback_is_an_8_bit_optimiser(train_tiny, monkeypatch):
    """With a stand-in that works without a GPU: what matters is that the run goes on with it, and is resumed with it."""
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw8bit", lambda run: torch.optim.Adam)
    failing(monkeypatch, optimizer_step, "microbatch_losses", 4)
    folder = train_tiny()
    assert relieved(folder)[-1] == ("step", 1, oom_fallbacks.EIGHT_BIT)
    shutil.rmtree(max((folder / "state").iterdir()))
    assert run_in(folder) == 0 and len(relieved(folder)) == 4


def test_samples_and_validation_that_never_fit_do_not_end_the_run(train_tiny, monkeypatch):
    failing(monkeypatch, training_samples, "generate", 1000)
    failing(monkeypatch, validation, "validation_losses", 1000)
    status = run_status.read_status(train_tiny())
    assert status.state == "finished" and not status.samples and not status.validation_losses


def test_out_of_memory_while_loading_is_not_reported_as_damage(tiny_run, monkeypatch):
    from diffusers import StableDiffusionPipeline

    failing(monkeypatch, StableDiffusionPipeline, "from_pretrained", 1)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 0 and relieved(folder) == [("load", 0, FREE)]


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd35-medium"])
def test_samples_from_encoded_prompts_need_no_text_encoder(
    tiny_run, tmp_path, monkeypatch, kind
):
    """From prompts that were encoded once: the same pictures as from the encoders themselves."""
    base = save_tiny_base(tmp_path / "base", kind=kind)
    changes = {
        "base.model": str(base),
        "training.text_encoder_learning_rate": 0,
        "dataset.trigger": "zorbit",
        "sampling.prompts": ["zorbit, red"],
    }
    folder = run_folder.create(tiny_run(changes))
    session = setup.prepare(
        config.load(folder / "run.toml"), folder, events.EventLog(folder / "events.jsonl")
    )
    settings = {
        "prompt": "zorbit, red",
        "negative_prompt": "",
        "seed": 1,
        "inference_steps": 2,
        "guidance_scale": 3.0,
    }
    by_encoders = generate(session.model.base, **settings)
    for part in session.model.base.family.text_encoders(session.model.base.pipe).values():
        monkeypatch.setattr(part, "forward", None)
    difference = ImageChops.difference(
        by_encoders, generate(session.model.base, **settings, texts=session.data.texts)
    )
    assert max(high for _, high in difference.getextrema()) <= 1
    training_samples.draw_samples(session, 0)
    status = run_status.read_status(folder)
    assert len(status.samples) == 1 and status.probes and not status.warnings


def test_vae_tiles_are_smaller_than_its_own_image_size(tiny_base, monkeypatch):
    """diffusers' own are as large as those, and so spare nothing there."""
    vae = families.load_base(config.Base(model=str(tiny_base)), torch.float32).pipe.vae
    side, decoded = vae.config.sample_size, []
    monkeypatch.setattr(
        vae.decoder,
        "forward",
        lambda z, real=vae.decoder.forward: decoded.append(z.shape[-1]) or real(z),
    )
    latents = torch.randn(
        1,
        4,
        *[side // 2 ** (len(vae.config.block_out_channels) - 1)] * 2,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        whole = vae.decode(latents).sample
        oom_fallbacks.set_tiling(vae, True)
        tiled = vae.decode(latents).sample
        oom_fallbacks.set_tiling(vae, False)
        assert torch.equal(vae.decode(latents).sample, whole)
    assert (
        decoded[0] == decoded[-1] == latents.shape[-1]
        and len(decoded) > 5
        and max(decoded[1:-1]) == latents.shape[-1] // 2
    )
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)


def test_a_split_microbatch_has_the_same_gradients(tiny_run):
    """The same pictures, noise and timesteps; the gradients differ by rounding only."""
    run = tiny_run(
        {
            "training.batch_size": 4,
            "dataset.repeats": [". = 2"],  # two images of each shape, twice
            "dataset.caption_dropout": 0.5,
            "training.text_encoder_learning_rate": 1e-3,
        }
    )
    folder = run_folder.create(run)
    session = setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))
    scaler, found = torch.amp.GradScaler("cpu", enabled=False), []
    for pieces in (1, 2, 4, 8):
        session.fallbacks.pieces["step"] = pieces
        loss = loop.forward_backward(session, 1, scaler)
        found.append((loss, torch.cat([p.grad.flatten() for p in session.optimisation.parameters.values()])))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        assert float((gradients - found[0][1]).norm() / found[0][1].norm()) < 1e-5
    whole = validation.validation_losses(session)
    session.fallbacks.pieces["validate"] = 8
    assert validation.validation_losses(session) == pytest.approx(whole, rel=1e-6)


def test_a_resumed_run_applies_fallbacks_again_at_the_same_step(tiny_run, monkeypatch):
    """Interrupted or not, a run that ran out of memory gives the same adapter, though the second life has room enough."""
    changes = {"adapter.dropout": 0.3, "saving.precision": "fp32"}

    def at_step_four(session, microbatch, *piece):
        return microbatch == 3

    with monkeypatch.context() as patch:
        failing(patch, optimizer_step, "microbatch_losses", 3, only=at_step_four)
        whole = run_folder.create(tiny_run(changes))
        assert run_in(whole) == 0
    with monkeypatch.context() as patch:
        failing(patch, optimizer_step, "microbatch_losses", 3, only=at_step_four)
        broken = run_folder.create(tiny_run(changes))
        append = events.EventLog.append

        def dies_after_four(self, event):
            append(self, event)
            if isinstance(event, events.StepDone) and event.step == 4:
                raise ZeroDivisionError

        patch.setattr(events.EventLog, "append", dies_after_four)
        assert run_in(broken) == 1
    assert max(int(state.name) for state in (broken / "state").iterdir()) == 3
    assert run_in(broken) == 0
    assert (
        relieved(broken)
        == relieved(whole)
        == [("step", 4, rung) for rung in (FREE, CHECKPOINT, SPLIT)]
    )
    ours, theirs = adapter_of(broken), adapter_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_rollback_behind_a_fallback_keeps_the_fallback(
    tiny_run, monkeypatch
):
    """Step 3 takes every measure, steps 4 to 6 are not finite, and the state of step 2 knows of no measure. Interrupted or not, it is
    the same run (with a stand-in for 8 bits).
    """
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw8bit", lambda run: torch.optim.Adam)
    folders = [
        run_folder.create(
            tiny_run({"adapter.dropout": 0.3, "saving.precision": "fp32", "training.steps": 8})
        )
        for _ in range(2)
    ]
    real, append = optimizer_step.microbatch_losses, events.EventLog.append
    for folder, is_whole in zip(folders, (True, False), strict=True):
        calls, seen = iter(range(1, 1000)), []

        def troubled(*args, calls=calls):
            call = next(calls)
            if 3 <= call <= 6:
                raise torch.OutOfMemoryError("out of memory")
            factor = float("nan") if 9 <= call <= 14 else 1.0
            return (factor * loss for loss in real(*args))

        def dying(self, event, seen=seen, is_whole=is_whole):
            append(self, event)
            seen.append(type(event))
            if not is_whole and isinstance(event, events.StepDone) and events.RolledBack in seen:
                raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(optimizer_step, "microbatch_losses", troubled)
            patch.setattr(events.EventLog, "append", dying)
            assert run_in(folder) == (0 if is_whole else 1), run_status.read_status(folder).message
    whole, broken = folders
    assert any("went back to step 2" in warning for warning in run_status.read_status(broken).warnings)
    assert run_in(broken) == 0 and relieved(broken) == relieved(whole) == [
        ("step", 3, r) for r in oom_fallbacks.FALLBACKS_BY_PHASE["step"]
    ]
    ours, theirs = adapter_of(broken), adapter_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_advice_names_smaller_settings():
    run = config.replace(config.RunConfig(), {"dataset.resolution": 768, "adapter.rank": 1})
    assert "dataset.resolution to 576" in oom_fallbacks.advice(
        run
    ) and "rank" not in oom_fallbacks.advice(run)
    assert families.is_out_of_memory is oom_fallbacks.is_out_of_memory and not oom_fallbacks.is_out_of_memory(OSError("x"))
