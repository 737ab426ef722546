"""The noise schedule of a loaded base, in training and in samples."""

import pytest
import torch

from trainer import config
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.inference.samples import generate

INFERENCE_STEPS = 4


@pytest.fixture
def load_with(base_of):
    """Returns a function that loads a kind of base with settings of `config.Base`."""

    def load(kind, **settings):
        return load_base(config.Base(model=str(base_of(kind)), **settings), torch.float32)

    return load


def sampled_timesteps(base):
    """Returns the timesteps that the denoiser receives while one image is sampled."""
    timesteps = []
    hook = base.denoiser.register_forward_pre_hook(
        lambda module, args: timesteps.append(int(args[1]))
    )
    generate(
        base,
        prompt="a red star",
        negative_prompt="",
        seed=1,
        inference_steps=INFERENCE_STEPS,
        guidance_scale=1.0,
        width=16,
        height=16,
    )
    hook.remove()
    return timesteps


@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl-v"])
def test_samples_with_zero_terminal_snr_start_from_the_last_timestep(load_with, kind):
    """Otherwise the pure noise of the training is never sampled (Lin et al. 2024, section 3.3)."""
    base = load_with(kind, prediction="v", zero_terminal_snr="on")
    objective = base.family.objective(base.pipe)
    timesteps = sampled_timesteps(base)
    assert len(timesteps) == INFERENCE_STEPS
    assert timesteps[0] == len(objective.alphas_cumprod) - 1
    assert float(objective.snr(torch.tensor(timesteps[:1]))) < 1e-6


def test_samples_without_zero_terminal_snr_keep_the_spacing_of_the_base(load_with):
    """Leading spacing, as in Stable Diffusion 1.5, never reaches the last timestep."""
    base = load_with("sd1")
    assert base.pipe.scheduler.config.timestep_spacing == "leading"
    assert sampled_timesteps(base)[0] < 999


def test_settings_for_diffusion_are_refused_for_flow_matching(load_with):
    for settings in ({"prediction": "v"}, {"zero_terminal_snr": "on"}):
        with pytest.raises(ModelError, match="do not apply to base, .* set both to auto"):
            load_with("sd3", **settings)
