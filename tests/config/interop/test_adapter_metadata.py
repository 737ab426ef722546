"""The metadata of a finished adapter fills the form again."""

import json

import pytest

from tests.config.interop.helpers import carry_over, carry_over_to, values
from trainer.config import interop
from trainer.errors import ConfigError

METADATA = {
    "ss_network_dim": "12",
    "ss_network_alpha": "6",
    "ss_unet_lr": "0.0003",
    "ss_text_encoder_lr": "None",
    "ss_learning_rate": "0.0001",
    "ss_resolution": "(768, 768)",
    "ss_steps": "900",
    "ss_clip_skip": "None",
    "ss_gradient_checkpointing": "True",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit",
    "modelspec.trigger_phrase": "p3r5on",
    "ss_session_id": "1",
}


def test_texts_are_read_as_values():
    run, unsupported = carry_over(METADATA)
    expected = {
        "adapter.rank": 12,
        "adapter.alpha": 6.0,
        "dataset.resolution": 768,
        "dataset.trigger": "p3r5on",
        "training.steps": 900,
        "training.learning_rate": 3e-4,
        "training.text_encoder_learning_rate": 1e-4,
        "training.optimizer": "adamw8bit",
        "training.gradient_checkpointing": True,
        "base.clip_skip": 1,
    }
    assert values(run, expected) == expected
    assert unsupported == []


def test_none_switches_a_setting_off():
    data = {
        "ss_network_dim": "16",
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "loha", "conv_dim": "8"}',
        "ss_learning_rate": "0.0001",
        "ss_text_encoder_lr": "[5e-05, 1e-05]",
        "ss_min_snr_gamma": "None",
        "ss_noise_offset": "None",
        "ss_steps": "900",
        "ss_max_train_steps": "1600",
        "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))",
    }
    expected = {
        "adapter.kind": "loha",
        "adapter.conv_rank": 8,
        "objective.min_snr_gamma": 0.0,
        "objective.noise_offset": 0.0,
        "training.steps": 900,
        "training.text_encoder_learning_rate": 5e-5,
        "training.text_encoder_2_learning_rate": 1e-5,
        "training.optimizer": "adamw8bit",
        "training.weight_decay": 0.1,
        "training.optimizer_args": ("betas=(0.9, 0.99)",),
    }
    assert values(carry_over_to(data, {"objective.noise_offset": 0.1}), expected) == expected


def test_damaged_arguments_are_refused_with_their_name():
    with pytest.raises(ConfigError, match="^ss_network_args = { is not a table"):
        interop.read(json.dumps({"ss_network_dim": "8", "ss_network_args": "{"}))
