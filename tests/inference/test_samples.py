"""Pictures: the same request is the same picture, and strength 0 is the base to the bit."""

import io
import json

import pytest
import torch
from PIL import Image

from tests.tiny import save_tiny_base
from trainer import config
from trainer.config import Base
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.inference.request import SampleRequest, StackedAdapter, parse_request
from trainer.inference.samplers import SAMPLERS, compatible_samplers
from trainer.inference.samples import Sampler
from trainer.inference.serving import serve
from trainer.runs import run_status


@pytest.fixture(scope="module")
def sampler():
    return Sampler()


@pytest.fixture
def adapter(train_tiny):
    folder = train_tiny({"training.text_encoder_learning_rate": 1e-2})
    return str(folder / run_status.read_status(folder).finished.file)


@pytest.fixture
def picture(sampler, tiny_base, tmp_path):
    def make(*stack, **changes):
        target = tmp_path / f"{len(list(tmp_path.glob('*.png')))}.png"
        adapters = [StackedAdapter(file, strength) for file, strength in stack]
        settings = {
            "prompt": "picture number 1",
            "inference_steps": 2,
            "base": Base(model=str(tiny_base)),
        } | changes
        return Image.open(
            sampler.render(SampleRequest(target=str(target), adapters=adapters, **settings))
        )

    return make


def test_strength_zero_is_the_base_whatever_came_before(picture, adapter):
    base = picture()
    full = picture((adapter, 1.0))
    assert base.tobytes() == picture((adapter, 0.0)).tobytes() == picture().tobytes()
    assert full.tobytes() == picture((adapter, 1.0)).tobytes()
    assert (
        len(
            {
                image.tobytes()
                for image in (
                    base,
                    full,
                    picture((adapter, 0.5)),
                    picture((adapter, 2.0)),
                    picture((adapter, -1.0)),
                )
            }
        )
        == 5
    )


def test_each_setting_matters(picture):
    plain = picture().tobytes()
    for changes in (
        {"seed": 2},
        {"prompt": "x"},
        {"negative_prompt": "y"},
        {"inference_steps": 3},
        {"guidance_scale": 3.0},
        {"width": 24},
    ):
        assert picture(**changes).tobytes() != plain, changes
    assert picture(width=24, height=32).size == (24, 32)


def test_each_sampler_draws_its_own_way_and_leaves_no_trace(picture):
    plain = picture(inference_steps=4)
    drawn = {
        name: picture(inference_steps=4, sampler=name)
        for name in config.choices(dict(config.fields())["sampling.sampler"])
    }
    assert (
        drawn["auto"].tobytes()
        == drawn["DPM++ 2M"].tobytes()
        == plain.tobytes()
        == picture(inference_steps=4).tobytes()
    )
    assert len({image.tobytes() for image in drawn.values()}) == len(drawn) - 1
    assert "Sampler: Euler a" in drawn["Euler a"].text["parameters"] and set(drawn) == {
        "auto",
        *SAMPLERS,
    }
    with pytest.raises(ModelError, match="Choose one of: DPM"):
        picture(sampler="PLMS")


def test_only_samplers_that_begin_at_pure_noise_fit_a_schedule_that_ends_there(picture, tmp_path):
    base = Base(model=str(save_tiny_base(tmp_path / "v", kind="sdxl-v")))
    with pytest.raises(ModelError, match="does not support the sampler Heun. Choose one of: DPM[^.]*UniPC"):
        picture(base=base, sampler="Heun")
    pipe = load_base(base, torch.float32).pipe
    for kind, options in compatible_samplers(pipe).values():
        assert float(kind.from_config(pipe.scheduler.config, **options).alphas_cumprod[-1]) < 1e-6


def test_a_picture_tells_how_it_was_made(picture, adapter):
    text = picture((adapter, 0.8), negative_prompt="fog", seed=7).text["parameters"]
    assert all(
        part in text
        for part in (
            "picture number 1",
            "Negative prompt: fog",
            "Seed: 7",
            "Steps: 2",
            "tiny: 0.8",
            "Sampler: DPM++ 2M",
        )
    )


def test_samples_of_a_run_are_those_of_its_saved_file(train_tiny, picture):
    """What is previewed from the file is what was seen while training."""
    folder = train_tiny({"dataset.resolution": 16, "saving.precision": "fp32"})
    status = run_status.read_status(folder)
    shown = Image.open(folder / status.samples[-1].file)
    again = picture(
        (str(folder / status.finished.file), 1.0),
        prompt=status.samples[-1].prompt,
        width=16,
        height=16,
    )
    assert max(abs(a - b) for a, b in zip(shown.tobytes(), again.tobytes(), strict=True)) <= 1


def test_serving_answers_each_line_and_survives_nonsense(tiny_base, tmp_path):
    good = {
        "prompt": "a",
        "target": str(tmp_path / "a.png"),
        "base": {"model": str(tiny_base)},
        "inference_steps": 1,
    }
    requests = [
        "not json",
        json.dumps([]),
        json.dumps({"prompt": "a"}),
        json.dumps(good | {"adapters": [{"file": "/etc/passwd"}]}),
        json.dumps(good | {"base": {"model": "/nowhere"}}),
        json.dumps(good),
    ]
    replies = io.StringIO()
    serve(io.StringIO("\n".join(requests) + "\n"), replies)
    answers = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [list(answer)[0] for answer in answers] == ["error"] * 5 + ["file"]
    assert "passwd is not a usable .safetensors" in answers[3]["error"] and Image.open(
        answers[5]["file"]
    )


def test_an_adapter_of_another_base_is_refused_in_a_sentence(tmp_path, picture):
    from safetensors.torch import save_file

    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{key}.lora_down.weight": torch.ones(2, 99),
            f"{key}.lora_up.weight": torch.ones(77, 2),
            f"{key}.alpha": torch.tensor(2.0),
        },
        tmp_path / "other.safetensors",
    )
    with pytest.raises(
        ModelError,
        match="does not fit the base model base .Stable Diffusion 1.x.: it was trained on another one",
    ):
        picture((str(tmp_path / "other.safetensors"), 1.0))


def test_a_request_is_checked():
    with pytest.raises(ModelError, match="seed"):
        parse_request({"prompt": "a", "target": "x", "seed": "many"})
