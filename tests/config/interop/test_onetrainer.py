"""Settings of OneTrainer keep their meaning."""

import pytest

from tests.config.interop.helpers import carry_over, carry_over_to, values
from trainer.config.interop import translation

SMALL = {
    "__version": 10,
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_15",
    "base_model_name": "a/b",
    "lora_rank": 16,
    "lora_alpha": 1.0,
    "learning_rate": 0.0003,
    "text_encoder": {"train": False, "learning_rate": None},
    "epochs": 100,
    "batch_size": 4,
    "resolution": "512",
    "train_dtype": "FLOAT_16",
    "output_dtype": "FLOAT_32",
    "optimizer": {"optimizer": "ADAFACTOR", "weight_decay": 0.02},
    "learning_rate_scheduler": "CONSTANT",
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 5.0,
    "gradient_checkpointing": "ON",
    "clip_grad_norm": 1.0,
    "offset_noise_weight": 0.02,
    "masked_training": True,
    "tensorboard": True,
}

COMPLETE = SMALL | {
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "ema": "OFF",
    "ema_decay": 0.999,
    "loss_weight_fn": "CONSTANT",
    "masked_training": False,
    "unmasked_weight": 0.1,
    "unet": {"train": True, "learning_rate": None},
    "text_encoder": {"train": False, "learning_rate": 3e-6, "stop_training_after": 30},
    "text_encoder_2": {"train": True, "learning_rate": None},
    "lokr_dim": 4,
}
"""A file as the program saves it, with fields that a switch turns off."""


def test_a_file_is_carried_over():
    run, unsupported = carry_over(SMALL)
    expected = {
        "base.model": "a/b",
        "base.precision": "fp16",
        "saving.precision": "fp32",
        "dataset.masked_loss": "mask",
        "adapter.rank": 16,
        "adapter.alpha": 1.0,
        "adapter.targets": "linear+conv",
        "training.learning_rate": 3e-4,
        "training.text_encoder_learning_rate": 0.0,
        "training.views_per_picture": 100,
        "training.batch_size": 4,
        "training.optimizer": "adafactor",
        "training.weight_decay": 0.02,
        "training.gradient_checkpointing": True,
        "training.lr_schedule": "constant",
        "objective.noise_offset": 0.02,
    }
    assert values(run, expected) == expected
    assert unsupported == [translation.OUTER_LAYERS]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            {
                "training.ema_decay": 0.0,
                "objective.min_snr_gamma": 0.0,
                "adapter.rank": 16,
                "dataset.mask_outside": 0.0,
                "training.learning_rate": 3e-4,
                "training.text_encoder_learning_rate": 0.0,
                "training.text_encoder_2_learning_rate": 3e-4,
            },
        ),
        ({"ema": "GPU"}, {"training.ema_decay": 0.999}),
        (
            {"loss_weight_fn": "MIN_SNR_GAMMA"},
            {"objective.weighting": "min_snr", "objective.min_snr_gamma": 5.0},
        ),
        (
            {"loss_weight_fn": "P2", "loss_weight_strength": 2},
            {"objective.weighting": "p2", "objective.p2_gamma": 2.0},
        ),
        (
            {
                "unet": {"train": False},
                "text_encoder": {"train": True, "learning_rate": None, "stop_training_after": None},
            },
            {
                "training.learning_rate": 0.0,
                "training.text_encoder_learning_rate": 3e-4,
                "training.text_encoder_until": 1.0,
            },
        ),
        (
            {"text_encoder": {"train": True, "stop_training_after": 30}},
            {"training.text_encoder_until": 0.3},
        ),
        (
            {"resolution": "512,768,1024"},
            {"dataset.resolution": 1024, "dataset.resolutions": (768, 512)},
        ),
        (
            {"layer_filter": "attentions,x.y"},
            {"adapter.target_pattern": r"attentions|x\.y", "adapter.targets": "attention"},
        ),
        (
            {"layer_filter": "attentions,x.y", "layer_filter_regex": True},
            {"adapter.target_pattern": "attentions|x.y"},
        ),
        (
            {"peft_type": "LOKR", "lokr_decompose_factor": -1},
            {"adapter.kind": "lokr", "adapter.rank": 4, "adapter.lokr_factor": 0},
        ),
        ({"lora_decompose": True}, {"adapter.kind": "dora"}),
        (
            {"min_noising_strength": 0.1, "max_noising_strength": 0.9},
            {"objective.min_timestep": 100, "objective.max_timestep": 900},
        ),
        ({"text_encoder_layer_skip": 1}, {"base.clip_skip": 2}),
    ],
)
def test_fields_count_only_if_their_switch_is_on(changes, expected):
    form = {"training.ema_decay": 0.9, "training.steps": 50}
    run = carry_over_to(COMPLETE | changes, form)
    assert values(run, expected) == expected
    assert run.training.steps == 0, "the length in epochs replaces the number of steps"


def test_a_text_encoder_that_stops_after_steps_is_reported():
    text_encoder = {
        "train": True,
        "stop_training_after": 30,
        "stop_training_after_unit": "STEP",
    }
    run, unsupported = carry_over(COMPLETE | {"text_encoder": text_encoder})
    assert run.training.text_encoder_until == 1.0
    assert "stop_training_after = 30 STEP" in unsupported
