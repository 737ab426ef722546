"""Settings of kohya_ss and sd-scripts keep their meaning."""

import json

import pytest

from tests.config.interop.helpers import carry_over, carry_over_to, values
from trainer.config import interop
from trainer.config.interop import kohya
from trainer.errors import ConfigError
from trainer.lora import targets
from trainer.models import model_files

FORM = {
    "LoRA_type": "Standard",
    "network_dim": 32,
    "network_alpha": 16,
    "learning_rate": 0.0001,
    "unet_lr": 0.0002,
    "text_encoder_lr": 5e-05,
    "lr_scheduler": "cosine_with_restarts",
    "lr_scheduler_num_cycles": 2,
    "lr_warmup": 10,
    "lr_warmup_steps": 0,
    "optimizer": "AdamW8bit",
    "optimizer_args": "weight_decay=0.1 betas=0.9,0.99",
    "max_train_steps": 1600,
    "epoch": 3,
    "train_batch_size": 2,
    "max_resolution": "512,768",
    "mixed_precision": "bf16",
    "save_precision": "fp16",
    "min_snr_gamma": 5,
    "noise_offset": 0.05,
    "output_name": "maya",
    "cache_latents": True,
    "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5",
    "loss_type": "huber",
    "flip_aug": True,
    "xformers": "xformers",
    "gradient_checkpointing": True,
    "seed": 7,
    "sample_prompts": "a cat --n ugly --w 512\n# no prompt\na dog",
    "huber_schedule": "snr",
}
"""A file saved by the form of kohya_ss."""

SD_SCRIPTS = """
[model]
pretrained_model_name_or_path = "/models/xl.safetensors"
[network]
network_module = "networks.lora"
network_dim = 8
network_train_unet_only = true
[train]
learning_rate = 1e-4
max_train_epochs = 12
optimizer_type = "AdamW"
resolution = "1024,1024"
weird_new_thing = "on"
"""

NETWORK = {"network_module": "networks.lora", "network_dim": 8, "learning_rate": 1e-4}


def test_a_file_of_the_form_is_carried_over_completely():
    run, unsupported = carry_over(FORM)
    expected = {
        "name": "maya",
        "base.model": "runwayml/stable-diffusion-v1-5",
        "base.precision": "bf16",
        "dataset.resolution": 624,
        "dataset.flip": True,
        "adapter.rank": 32,
        "adapter.alpha": 16.0,
        "adapter.text_encoder_targets": "all",
        "training.learning_rate": 2e-4,
        "training.text_encoder_learning_rate": 5e-5,
        "training.warmup": 0.1,
        "training.steps": 1600,
        "training.views_per_picture": 80,
        "training.lr_schedule": "cosine_with_restarts",
        "training.lr_cycles": 2,
        "training.optimizer": "adamw8bit",
        "training.weight_decay": 0.1,
        "training.optimizer_args": ("betas=(0.9,0.99)",),
        "training.seed": 7,
        "objective.loss": "huber",
        "objective.noise_offset": 0.05,
        "sampling.prompts": ("a cat", "a dog"),
    }
    assert values(run, expected) == expected
    assert unsupported == []


def test_how_the_base_model_is_read_is_carried_over():
    reading = {
        "clip_skip": 2,
        "max_token_length": 225,
        "v_parameterization": True,
        "zero_terminal_snr": True,
        "vae": "/models/vae.safetensors",
    }
    run, unsupported = carry_over(FORM | reading)
    expected = {
        "base.clip_skip": 2,
        "dataset.caption_tokens": 225,
        "base.prediction": "v",
        "base.zero_terminal_snr": "on",
        "base.vae": "/models/vae.safetensors",
    }
    assert values(run, expected) == expected
    assert unsupported == []


def test_sections_of_a_toml_file_are_ignored():
    run, unsupported = carry_over(SD_SCRIPTS)
    expected = {
        "base.model": "/models/xl.safetensors",
        "adapter.rank": 8,
        "adapter.alpha": 1.0,
        "training.text_encoder_learning_rate": 0.0,
        "training.views_per_picture": 12,
        "training.steps": 0,
    }
    assert values(run, expected) == expected
    assert unsupported == ["weird_new_thing = on"]


def test_an_unknown_optimizer_is_reported():
    run, unsupported = carry_over(FORM | {"optimizer": "SomethingNew", "lr_scheduler": None})
    assert run.training.optimizer == "adamw" and run.name == "maya"
    assert unsupported == ["optimizer = SomethingNew"]


TRANSFORMERS_ONLY = {
    "adapter.target_pattern": kohya.TRANSFORMERS,
    "adapter.targets": "attention",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_train_epochs": 10, "max_train_steps": 1600}, (0, 10)),
        ({"max_train_epochs": 0, "max_train_steps": 0, "epoch": 10}, (0, 10)),
        ({"max_train_epochs": 0, "max_train_steps": 99, "epoch": 10}, (99, 80)),
    ],
)
def test_the_first_length_above_zero_counts(changes, expected):
    training = carry_over(NETWORK | changes)[0].training
    assert (training.steps, training.views_per_picture) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"unet_lr": 0, "text_encoder_lr": 0}, (1e-4, 1e-4, -1.0)),
        ({"unet_lr": 0, "text_encoder_lr": 1e-5}, (0.0, 1e-5, -1.0)),
        ({"text_encoder_lr": [1e-5, 2e-5]}, (1e-4, 1e-5, 2e-5)),
        ({"network_train_unet_only": True}, (1e-4, 0.0, -1.0)),
        ({"network_train_text_encoder_only": True}, (0.0, 1e-4, -1.0)),
    ],
)
def test_the_common_learning_rate_is_used_unless_a_part_has_its_own(changes, expected):
    training = carry_over(NETWORK | changes)[0].training
    assert expected == (
        training.learning_rate,
        training.text_encoder_learning_rate,
        training.text_encoder_2_learning_rate,
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.0),
        ({"lr_warmup": 10, "lr_scheduler": "constant"}, 0.0),
        ({"lr_warmup": 10, "lr_scheduler": "constant_with_warmup"}, 0.1),
        ({"lr_warmup_steps": 200, "lr_scheduler": "cosine", "max_train_steps": 900}, 200),
    ],
)
def test_the_warmup_is_in_percent_or_in_steps(changes, expected):
    assert carry_over(NETWORK | changes)[0].training.warmup == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"noise_offset_type": "Original"}, (0.1, 0.0)),
        ({"noise_offset_type": "Multires"}, (0.0, 0.3)),
        ({}, (0.1, 0.3)),
        ({"multires_noise_iterations": 0}, (0.1, 0.0)),
    ],
)
def test_only_the_chosen_kind_of_noise_counts(changes, expected):
    noise = {
        "noise_offset": 0.1,
        "multires_noise_iterations": 6,
        "multires_noise_discount": 0.3,
    }
    objective = carry_over(NETWORK | noise | changes)[0].objective
    assert (objective.noise_offset, objective.pyramid_noise) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, TRANSFORMERS_ONLY | {"adapter.kind": "lora"}),
        (
            {"network_args": ["conv_dim=8"]},
            {"adapter.targets": "linear+conv", "adapter.conv_rank": 8, "adapter.conv_alpha": 1.0},
        ),
        (
            {"LoRA_type": "Standard", "conv_dim": 8},
            TRANSFORMERS_ONLY | {"adapter.conv_rank": 0},
        ),
        (
            {"LoRA_type": "Kohya LoCon", "conv_dim": 8, "conv_alpha": 4},
            {"adapter.targets": "linear+conv", "adapter.conv_alpha": 4.0},
        ),
        (
            {"LoRA_type": "LyCORIS/LoHa", "LyCORIS_preset": "attn-mlp"},
            TRANSFORMERS_ONLY | {"adapter.kind": "loha"},
        ),
        (
            {
                "network_module": "lycoris.kohya",
                "network_args": ["algo=lokr", "factor=8", "use_tucker=False"],
            },
            {
                "adapter.kind": "lokr",
                "adapter.lokr_factor": 8,
                "adapter.targets": "linear+conv",
                "adapter.target_pattern": "",
            },
        ),
        (
            {"network_module": "lycoris.kohya", "network_args": ["algo=locon", "dora_wd=True"]},
            {"adapter.kind": "dora"},
        ),
    ],
)
def test_kind_and_layers_of_a_network(changes, expected):
    data = NETWORK | changes
    assert interop.read(json.dumps(data)).unsupported == []
    assert values(carry_over(data)[0], expected) == expected


def test_absent_settings_have_the_defaults_of_sd_scripts():
    form = {
        "adapter.max_norm": 2.0,
        "objective.noise_offset": 0.1,
        "training.lr_schedule": "linear",
        "objective.min_snr_gamma": 1.0,
    }
    expected = {
        "adapter.max_norm": 0.0,
        "objective.noise_offset": 0.0,
        "training.lr_schedule": "constant",
        "objective.min_snr_gamma": 0.0,
    }
    assert values(carry_over_to(NETWORK, form), expected) == expected


def test_captions_loss_and_timesteps_are_carried_over():
    data = NETWORK | {
        "debiased_estimation_loss": True,
        "flip_aug": True,
        "shuffle_caption": True,
        "caption_tag_dropout_rate": 0.1,
        "masked_loss": True,
        "prior_loss_weight": 0.5,
        "loss_type": "huber",
        "min_timestep": 100,
        "max_timestep": 900,
        "scale_weight_norms": 1,
        "ip_noise_gamma": 0.1,
    }
    expected = {
        "objective.weighting": "debiased",
        "dataset.flip": True,
        "dataset.shuffle_tags": True,
        "dataset.keep_tags": 0,
        "dataset.tag_dropout": 0.1,
        "dataset.masked_loss": "mask",
        "dataset.prior_loss_weight": 0.5,
        "objective.loss": "huber",
        "objective.min_timestep": 100,
        "objective.max_timestep": 900,
        "adapter.max_norm": 1.0,
        "objective.input_perturbation": 0.1,
    }
    run, unsupported = carry_over(data)
    assert values(run, expected) == expected
    assert unsupported == []


def test_the_trained_layers_are_those_of_its_transformers():
    adapter = carry_over(NETWORK)[0].adapter
    shapes = targets.projections(model_files.inspect(model_files.EMBEDDED_FOLDER).tensors["unet"])
    chosen = {target.name for target in targets.choose_targets(adapter, "unet", shapes)}
    assert chosen == {name for name in shapes if "attentions" in name}
    assert any(name.endswith("proj_in") for name in chosen)


@pytest.mark.parametrize(
    ("changes", "unsupported"),
    [
        ({"dataset_config": "d.toml"}, "dataset_config = d.toml"),
        (
            {"network_module": "lycoris.kohya", "network_args": ["algo=boft"]},
            "network_module = lycoris.kohya (boft)",
        ),
        ({"network_args": ["loraplus_lr_ratio=4"]}, "network_args.loraplus_lr_ratio = 4"),
        ({"seed": float("inf")}, "seed = inf"),
        ({"max_train_steps": float("inf")}, "max_train_steps = inf"),
        ({"text_encoder_lr": "abc"}, "text_encoder_lr = abc"),
        ({"sample_prompts": "prompts.txt"}, "sample_prompts = prompts.txt"),
    ],
)
def test_a_setting_without_a_counterpart_is_reported(changes, unsupported):
    assert carry_over(NETWORK | changes)[1] == [unsupported]


@pytest.mark.parametrize("name", ["lr_warmup", "max_train_steps", "noise_offset"])
def test_a_setting_on_which_others_depend_must_be_a_number(name):
    with pytest.raises(ConfigError, match=f"^{name} = abc is not a number"):
        interop.read(json.dumps(NETWORK | {name: "abc"}))
