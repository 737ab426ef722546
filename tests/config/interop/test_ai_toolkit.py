"""Settings of ai-toolkit keep their meaning."""

import pytest

from tests.config.interop.helpers import carry_over, values
from trainer.config import interop
from trainer.config.interop import translation
from trainer.errors import ConfigError

JOB = """
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
      train:
        batch_size: 1
        steps: 2000
        lr: 1e-4
        dtype: bf16
        optimizer: "adamw8bit"
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        ema_config: {use_ema: true, ema_decay: 0.99}
      model: {name_or_path: "stabilityai/stable-diffusion-xl-base-1.0", is_xl: true, quantize: true}
      sample:
        prompts: ["a cat", "a dog --w 64"]
        neg: "blurry"
        seed: 42
        guidance_scale: 4
        sample_steps: 20
        sampler: "ddpm"
"""


def test_the_first_process_and_dataset_are_carried_over():
    run, unsupported = carry_over(JOB)
    expected = {
        "name": "my_first_lora_v1",
        "base.precision": "bf16",
        "dataset.folder": "/path/to/images",
        "dataset.trigger": "p3r5on",
        "dataset.resolution": 1024,
        "dataset.resolutions": (768, 512),
        "dataset.shuffle_tags": True,
        "adapter.targets": "linear",
        "adapter.rank": 32,
        "training.steps": 2000,
        "training.ema_decay": 0.99,
        "training.learning_rate": 1e-4,
        "training.text_encoder_learning_rate": 0.0,
        "sampling.prompts": ("a cat", "a dog"),
        "sampling.negative_prompt": "blurry",
        "sampling.guidance_scale": 4.0,
    }
    assert values(run, expected) == expected
    assert unsupported == ["model.quantize = True", "1 more datasets", translation.OUTER_LAYERS]


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        ("train_unet: true", (1e-4, 0.0)),
        ("train_text_encoder: true", (1e-4, 1e-4)),
        ("train_unet: false", (0.0, 1e-4)),
    ],
)
def test_each_trained_part_has_the_learning_rate(switch, expected):
    text = f"config: {{process: [{{train: {{lr: 1e-4, {switch}}}}}]}}"
    training = carry_over(text)[0].training
    assert (training.learning_rate, training.text_encoder_learning_rate) == expected


def test_the_average_counts_only_if_it_is_switched_on():
    text = "config: {process: [{train: {ema_config: {use_ema: false, ema_decay: 0.99}}}]}"
    assert carry_over(text)[0].training.ema_decay == 0.0


def test_datasets_that_are_not_a_list_are_refused():
    with pytest.raises(ConfigError, match="^datasets = 5 is not a list"):
        interop.read("config: {process: [{datasets: 5}]}")
