"""Settings of other trainers: what maps arrives, and what does not is said."""

import json

import pytest

from trainer import config
from trainer.config import interop
from trainer.config.interop import kohya, translation
from trainer.errors import ConfigError
from trainer.lora import targets
from trainer.models import model_files

KOHYA_GUI = {
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
optimizer_type = "Prodigy"
resolution = "1024,1024"
weird_new_thing = "on"
"""
ONE_TRAINER = {
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
AI_TOOLKIT = """
job: extension
config:
  name: "my_first_lora_v1"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      trigger_word: "p3r5on"
      network: {type: "lora", linear: 32, linear_alpha: 16}
      save: {dtype: float16, save_every: 250}
      datasets:
        - folder_path: "/path/to/images"
          caption_dropout_rate: 0.1
          shuffle_tokens: true
          resolution: [512, 768, 1024]
        - folder_path: "/path/to/more"
      train: {batch_size: 1, steps: 2000, lr: 1e-4, dtype: bf16, optimizer: "adamw8bit", train_unet: true, train_text_encoder: false,
              gradient_checkpointing: true, ema_config: {use_ema: true, ema_decay: 0.99}}
      model: {name_or_path: "stabilityai/stable-diffusion-xl-base-1.0", is_xl: true, quantize: true}
      sample: {prompts: ["a cat", "a dog --w 64"], neg: "blurry", seed: 42, guidance_scale: 4, sample_steps: 20, sampler: "ddpm"}
"""


def carried(text: str) -> tuple[config.RunConfig, list[str]]:
    return interop.apply(interop.read(text), config.RunConfig())


def test_kohya_gui() -> None:
    run, left_out = carried(json.dumps(KOHYA_GUI))
    assert (run.name, run.adapter.rank, run.adapter.alpha) == ("maya", 32, 16)
    training = run.training
    assert (training.learning_rate, training.text_encoder_learning_rate, training.warmup) == (
        2e-4,
        5e-5,
        0.1,
    )
    assert (
        training.steps,
        training.views_per_picture,
        training.lr_schedule,
        training.lr_cycles,
    ) == (1600, 80, "cosine_with_restarts", 2)
    assert (training.optimizer, training.weight_decay, training.optimizer_args) == (
        "adamw8bit",
        0.1,
        ("betas=(0.9,0.99)",),
    )
    assert (
        run.dataset.resolution == 624
        and run.base.precision == "bf16"
        and run.sampling.prompts == ("a cat", "a dog")
    )
    assert (
        run.objective.loss == "huber"
        and run.dataset.flip
        and run.adapter.text_encoder_targets == "all"
        and left_out == []
    )


def test_how_a_model_is_read_is_carried_over() -> None:
    reading = {
        "clip_skip": 2,
        "max_token_length": 225,
        "v_parameterization": True,
        "zero_terminal_snr": True,
        "vae": "/models/vae.safetensors",
    }
    run, left_out = carried(json.dumps(KOHYA_GUI | reading))
    assert (run.base.clip_skip, run.dataset.caption_tokens, run.base.prediction) == (2, 225, "v")
    assert (run.base.zero_terminal_snr, run.base.vae) == ("on", "/models/vae.safetensors")
    assert not [text for text in left_out if text.split(" ")[0] in reading]


def test_sd_scripts() -> None:
    run, left_out = carried(SD_SCRIPTS.replace('"Prodigy"', '"AdamW"'))
    assert (
        run.base.model == "/models/xl.safetensors"
        and run.adapter.rank == 8
        and run.adapter.alpha == 1
    ), "its alpha is 1 where none is named"
    assert (
        run.training.text_encoder_learning_rate == 0
        and run.training.views_per_picture == 12
        and run.training.steps == 0
    )
    assert left_out == ["weird_new_thing = on"]


def test_what_does_not_fit_together_is_said() -> None:
    with pytest.raises(ConfigError, match="(?s)kohya do not fit together.*prodigy"):
        carried(SD_SCRIPTS)


def test_one_trainer() -> None:
    run, left_out = carried(json.dumps(ONE_TRAINER))
    assert (run.adapter.rank, run.adapter.alpha, run.training.learning_rate) == (16, 1, 3e-4)
    assert (
        run.training.text_encoder_learning_rate == 0
        and run.training.views_per_picture == 100
        and run.training.batch_size == 4
    )
    assert (run.base.precision, run.saving.precision, run.training.optimizer) == (
        "fp16",
        "fp32",
        "adafactor",
    )
    assert (
        run.objective.noise_offset == 0.02
        and run.training.gradient_checkpointing
        and run.training.lr_schedule == "constant"
    )
    assert (run.dataset.masked_loss, run.adapter.targets, left_out) == (
        "mask",
        "linear+conv",
        [translation.OUTER_LAYERS],
    )


def test_ai_toolkit() -> None:
    run, left_out = carried(AI_TOOLKIT)
    assert (run.name, run.dataset.trigger, run.dataset.resolution) == (
        "my_first_lora_v1",
        "p3r5on",
        1024,
    )
    assert (
        run.dataset.resolutions == (768, 512)
        and run.dataset.shuffle_tags
        and run.adapter.targets == "linear"
    )
    assert (run.adapter.rank, run.training.steps, run.training.ema_decay) == (32, 2000, 0.99)
    assert (
        run.sampling.prompts == ("a cat", "a dog")
        and run.sampling.negative_prompt == "blurry"
        and run.sampling.guidance_scale == 4
    )
    assert run.training.learning_rate == 1e-4 and run.training.text_encoder_learning_rate == 0
    assert left_out == ["model.quantize = True", "1 more datasets", translation.OUTER_LAYERS]


@pytest.mark.parametrize(
    "text", ["", "[]", "just text", '{"a": 1}', "a: [", "\x00", "{" * 2000, "x" * 1_000_001]
)
def test_what_is_no_settings_file_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="^The file"):
        interop.read(text)


def test_a_value_out_of_bounds_is_left_out_and_the_rest_arrives() -> None:
    run, left_out = carried(
        json.dumps(
            KOHYA_GUI | {"network_dim": 100_000, "optimizer": "SomethingNew", "lr_scheduler": None}
        )
    )
    assert run.adapter.rank == 16 and run.training.optimizer == "adamw" and run.name == "maya"
    assert "adapter.rank = 100000" in left_out and "optimizer = SomethingNew" in left_out


def test_the_metadata_of_a_finished_adapter() -> None:
    text = {
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
    run, left_out = carried(json.dumps(text))
    assert (run.adapter.rank, run.adapter.alpha, run.dataset.resolution, run.training.steps) == (
        12,
        6,
        768,
        900,
    )
    assert (
        run.training.optimizer == "adamw8bit"
        and run.training.gradient_checkpointing
        and run.dataset.trigger == "p3r5on"
        and not left_out
    )


def test_the_text_of_a_picture() -> None:
    text = "a cat, sitting\nNegative prompt: fog, rain\nSteps: 12, Sampler: Euler a, CFG scale: 4.5, Seed: 9, Size: 512x512"
    sampling = carried(json.dumps({"parameters": text}))[0].sampling
    assert (sampling.prompts, sampling.negative_prompt, sampling.inference_steps) == (
        ("a cat, sitting",),
        "fog, rain",
        12,
    )
    assert (sampling.sampler, sampling.guidance_scale, sampling.seed) == ("Euler a", 4.5, 9)


def changed(data: dict, form: dict | None = None) -> dict:
    """What a file sets, by the path of ours, on a form that has other values than a fresh one."""
    run = interop.apply(
        interop.read(json.dumps(data)), config.replace(config.RunConfig(), form or {})
    )[0]
    return {path: config.get(run, path) for path, _ in config.fields()}


FULL_ONE_TRAINER = ONE_TRAINER | {
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
            {},
            {
                "training.learning_rate": 3e-4,
                "training.text_encoder_learning_rate": 0,
                "training.text_encoder_2_learning_rate": 3e-4,
            },
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
            {"layer_filter": "attentions,x"},
            {"adapter.target_pattern": "attentions|x", "adapter.targets": "attention"},
        ),
        (
            {"peft_type": "LOKR", "lokr_decompose_factor": -1},
            {"adapter.kind": "lokr", "adapter.rank": 4, "adapter.lokr_factor": 0},
        ),
        (
            {"min_noising_strength": 0.1, "max_noising_strength": 0.9},
            {"objective.min_timestep": 100, "objective.max_timestep": 900},
        ),
    ],
)
def test_one_trainers_fields_count_with_their_switches(changes: dict, expected: dict) -> None:
    run = changed(FULL_ONE_TRAINER | changes, {"training.ema_decay": 0.9, "training.steps": 50})
    assert expected | {"training.steps": 0} == {
        path: run[path] for path in (*expected, "training.steps")
    }


NETWORK = {"network_module": "networks.lora", "network_dim": 8, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"max_train_epochs": 10, "max_train_steps": 1600},
            {"training.steps": 0, "training.views_per_picture": 10},
        ),
        (
            {"max_train_epochs": 0, "max_train_steps": 0, "epoch": 10},
            {"training.steps": 0, "training.views_per_picture": 10},
        ),
        (
            {"max_train_epochs": 0, "max_train_steps": 99, "epoch": 10},
            {"training.steps": 99, "training.views_per_picture": 80},
        ),
        (
            {"unet_lr": 0, "text_encoder_lr": 0},
            {"training.learning_rate": 1e-4, "training.text_encoder_learning_rate": 1e-4},
        ),
        (
            {"unet_lr": 0, "text_encoder_lr": 1e-5},
            {"training.learning_rate": 0.0, "training.text_encoder_learning_rate": 1e-5},
        ),
        ({"text_encoder_lr": [1e-5, 2e-5]}, {"training.text_encoder_2_learning_rate": 2e-5}),
        (
            {},
            {
                "objective.min_snr_gamma": 0.0,
                "training.lr_schedule": "constant",
                "training.warmup": 0.0,
                "adapter.max_norm": 0.0,
            },
        ),
        ({"lr_warmup": 10, "lr_scheduler": "constant"}, {"training.warmup": 0.0}),
        ({"lr_warmup": 10, "lr_scheduler": "constant_with_warmup"}, {"training.warmup": 0.1}),
        (
            {"lr_warmup_steps": 200, "lr_scheduler": "cosine", "max_train_steps": 900},
            {"training.warmup": 200},
        ),
        ({"debiased_estimation_loss": True}, {"objective.weighting": "debiased"}),
        (
            {"noise_offset_type": "Original", "noise_offset": 0.1, "multires_noise_iterations": 6},
            {"objective.pyramid_noise": 0.0},
        ),
        (
            {
                "noise_offset_type": "Multires",
                "noise_offset": 0.1,
                "multires_noise_iterations": 6,
                "multires_noise_discount": 0.3,
            },
            {"objective.pyramid_noise": 0.3, "objective.noise_offset": 0.0},
        ),
        (
            {},
            {
                "adapter.target_pattern": kohya.TRANSFORMERS,
                "adapter.targets": "attention",
                "adapter.kind": "lora",
            },
        ),
        (
            {"network_args": ["conv_dim=8"]},
            {"adapter.targets": "linear+conv", "adapter.conv_rank": 8, "adapter.conv_alpha": 1.0},
        ),
        (
            {"LoRA_type": "Standard", "conv_dim": 8},
            {"adapter.target_pattern": kohya.TRANSFORMERS, "adapter.conv_rank": 0},
        ),
        (
            {"LoRA_type": "Kohya LoCon", "conv_dim": 8, "conv_alpha": 4},
            {"adapter.targets": "linear+conv", "adapter.conv_alpha": 4.0},
        ),
        (
            {"LoRA_type": "LyCORIS/LoHa", "LyCORIS_preset": "attn-mlp"},
            {"adapter.kind": "loha", "adapter.targets": "attention"},
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
        (
            {
                "flip_aug": True,
                "shuffle_caption": True,
                "caption_tag_dropout_rate": 0.1,
                "masked_loss": True,
                "prior_loss_weight": 0.5,
            },
            {
                "dataset.flip": True,
                "dataset.shuffle_tags": True,
                "dataset.keep_tags": 0,
                "dataset.tag_dropout": 0.1,
            }
            | {"dataset.masked_loss": "mask", "dataset.prior_loss_weight": 0.5},
        ),
        (
            {
                "loss_type": "huber",
                "min_timestep": 100,
                "max_timestep": 900,
                "scale_weight_norms": 1,
                "ip_noise_gamma": 0.1,
            },
            {
                "objective.loss": "huber",
                "objective.min_timestep": 100,
                "objective.max_timestep": 900,
                "adapter.max_norm": 1.0,
            }
            | {"objective.input_perturbation": 0.1},
        ),
    ],
)
def test_kohyas_settings_mean_what_they_mean_there(changes: dict, expected: dict) -> None:
    data = NETWORK | changes
    assert interop.read(json.dumps(data)).unsupported == []
    assert expected == {
        path: value
        for path, value in changed(data, {"adapter.max_norm": 2.0}).items()
        if path in expected
    }


def test_kohyas_layers_are_those_of_its_transformers() -> None:
    adapter = carried(json.dumps(NETWORK))[0].adapter
    shapes = targets.projections(model_files.inspect(model_files.EMBEDDED_FOLDER).tensors["unet"])
    chosen = {target.name for target in targets.choose_targets(adapter, "unet", shapes)}
    assert chosen == {name for name in shapes if "attentions" in name} and any(
        name.endswith("proj_in") for name in chosen
    )


@pytest.mark.parametrize(
    ("changes", "left_out"),
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
    ],
)
def test_what_kohya_has_alone_is_said(changes: dict, left_out: str) -> None:
    assert carried(json.dumps(NETWORK | changes))[1] == [left_out]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (json.dumps(NETWORK | {"lr_warmup": "abc"}), "lr_warmup = abc"),
        (json.dumps(NETWORK | {"max_train_steps": "abc"}), "max_train_steps = abc"),
        (json.dumps({"ss_network_dim": "8", "ss_network_args": "{"}), "ss_network_args = {"),
        ("config: {process: [{datasets: 5}]}", "datasets = 5"),
        ("network_dim: &a [1]\nnetwork_args: [*a, *a]", "aliases"),
    ],
)
def test_what_cannot_be_settled_is_refused_by_name(text: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        interop.read(text)


def test_the_metadata_of_a_lycoris_file_means_off_where_it_says_none() -> None:
    text = {
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
    run = changed(text, {"objective.noise_offset": 0.1})
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
    assert expected == {path: run[path] for path in expected}
