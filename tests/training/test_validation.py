"""The validation loss: fixed noise, and a different one for each image."""

import pytest
import torch

from trainer.runs import run_folder
from trainer.runs.events import SilentLog
from trainer.training import validation
from trainer.training.setup import prepare


@pytest.fixture
def session(tiny_run):
    run = tiny_run()
    return prepare(run, run_folder.create(run), SilentLog())


def test_the_validation_loss_of_the_same_weights_is_identical(session):
    first = validation.validation_losses(session)
    assert validation.validation_losses(session) == first
    assert len(set(first)) == len(first)


def test_every_image_and_timestep_has_its_noise(session, monkeypatch):
    """With a base that predicts the noise, the target is the noise."""
    noise, timesteps = [], []

    def recording(session, batch, noised, mask):
        noise.extend(noised.target)
        timesteps.extend(noised.timesteps.tolist())
        return torch.zeros(len(noised.target))

    monkeypatch.setattr(validation, "denoising_losses", recording)
    validation.validation_losses(session)
    images = len(session.data.validation)
    assert images == 4
    assert len(noise) == images * validation.VALIDATION_TIMESTEPS
    flat = {tuple(each.flatten().tolist()[:8]) for each in noise}
    assert len(flat) == len(noise)
    for index in range(images):
        start = index * validation.VALIDATION_TIMESTEPS
        of_image = timesteps[start : start + validation.VALIDATION_TIMESTEPS]
        assert of_image == sorted(set(of_image)), "the timesteps are spread"


@pytest.mark.parametrize(("images", "numbers"), [(1, 32), (2, 32), (4, 32), (7, 56), (8, 8)])
def test_few_images_give_every_draw_and_many_give_means(session, monkeypatch, images, numbers):
    def draws(session, example, index=0, draws=validation.VALIDATION_TIMESTEPS):
        return torch.full((draws,), float(index))

    monkeypatch.setattr(validation, "fixed_losses", draws)
    session.data.validation[:] = session.data.validation[:1] * images
    losses = validation.validation_losses(session)
    assert len(losses) == numbers
    assert set(losses) == set(map(float, range(images)))
