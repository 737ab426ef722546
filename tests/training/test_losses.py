"""The forward pass of a step: which captions, gradients and noise it uses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.runs import run_folder
from trainer.runs.events import SilentLog
from trainer.training.session import Session
from trainer.training.setup import prepare
from trainer.training.step import losses, optimizer_step


@pytest.fixture
def session_of(tiny_run):
    """Returns a function that prepares a session with changed settings."""

    def make(changes: dict | None = None) -> Session:
        run = tiny_run(changes)
        return prepare(run, run_folder.create(run), SilentLog())

    return make


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_caption_dropout_drops_its_fraction_of_the_captions(session_of, dropout):
    session = session_of({"dataset.caption_dropout": dropout})
    captions = ["a caption"] * 2000
    draws = torch.Generator().manual_seed(0)
    kept = losses._with_dropped_captions(session, captions, draws)
    assert set(kept) <= {"a caption", ""}
    assert kept.count("") / len(kept) == pytest.approx(dropout, abs=0.03)


@pytest.mark.parametrize(("dropout", "is_empty"), [(0.0, False), (1.0, True)])
def test_the_model_sees_captions_unless_they_are_dropped(
    session_of, monkeypatch, dropout, is_empty
):
    session = session_of({"dataset.caption_dropout": dropout})
    seen: list[str] = []
    real = losses.conditioning_for

    def recording(session, captions, *learns):
        seen.extend(captions)
        return real(session, captions, *learns)

    monkeypatch.setattr(losses, "conditioning_for", recording)
    list(losses.microbatch_losses(session, 0))
    assert len(seen) == 2
    assert all((caption == "") == is_empty for caption in seen)


def test_images_of_a_microbatch_get_different_noise(session_of, monkeypatch):
    session = session_of({"objective.noise_offset": 0.0})
    targets = []

    def recording(session, batch, noised, mask):
        targets.append(noised.target)
        return torch.zeros(len(noised.target))

    monkeypatch.setattr(losses, "denoising_losses", recording)
    for microbatch in (0, 1, 0):
        list(losses.microbatch_losses(session, microbatch))
    first, second, again = targets
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(one, other) for one in first for other in second)


@pytest.mark.parametrize(("fraction", "last_step"), [(0.5, 3), (0.4, 3), (1.0, 6)])
def test_text_encoders_learn_up_to_their_last_step(session_of, fraction, last_step):
    """The last step is the fraction of all steps, rounded up."""
    session = session_of({"training.text_encoder_until": fraction, "training.steps": 6})
    learned = [step for step in range(1, 7) if session.learns("text_encoder", step)]
    assert learned == list(range(1, last_step + 1))
    assert all(session.learns("unet", step) for step in range(1, 7))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_saved_text_encoders_change_up_to_their_last_step(train_tiny, accumulation):
    folder = train_tiny(
        {
            "training.text_encoder_learning_rate": 1e-2,
            "training.text_encoder_until": 0.5,
            "training.lr_schedule": "constant",
            "training.gradient_accumulation_steps": accumulation,
            "training.batch_size": 1,
            "saving.saves": 6,
            "saving.precision": "fp32",
        }
    )
    by_step = [_text_encoder(folder / f"tiny-{step:06d}.safetensors") for step in range(1, 7)]
    changes = [
        step + 1 for step in range(1, 6) if not torch.equal(by_step[step - 1], by_step[step])
    ]
    assert changes == [2, 3]


def _text_encoder(path: Path) -> torch.Tensor:
    tensors = load_file(path)
    names = sorted(name for name in tensors if name.startswith("lora_te_"))
    return torch.cat([tensors[name].flatten() for name in names])


@pytest.mark.parametrize(
    ("max_grad_norm", "factor"), [(0.0, 1.0), (1e9, 1.0), (0.5, None)], ids=["off", "high", "low"]
)
def test_max_grad_norm_limits_the_norm_and_zero_means_no_limit(session_of, max_grad_norm, factor):
    session = session_of({"training.max_grad_norm": max_grad_norm})
    parameters = list(session.optimisation.parameters.values())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert optimizer_step.clip_gradients(session, scaler)
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])
    if factor is None:
        assert float(gradients.norm()) == pytest.approx(max_grad_norm, rel=1e-3)
    else:
        assert torch.equal(gradients, torch.full_like(gradients, 3.0 * factor))
