"""The same request gives the same image, and strength 0 gives the base's."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file

from tests.lora.helpers import kohya_tensors, random_pair
from trainer import config
from trainer.config import Base
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.inference.request import SampleRequest, StackedAdapter
from trainer.inference.samplers import SAMPLERS, compatible_samplers
from trainer.inference.samples import Sampler, generate
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
def sample(sampler, tiny_base, tmp_path):
    """Returns a function that generates an image: sample((file, strength), ..., seed=2)."""

    def make(*stack, **changes):
        request = SampleRequest(
            prompt="image number 1",
            target=str(tmp_path / f"{len(list(tmp_path.glob('*.png')))}.png"),
            inference_steps=2,
            base=Base(model=str(tiny_base)),
            adapters=[StackedAdapter(*adapter) for adapter in stack],
        )
        return Image.open(sampler.render(replace(request, **changes)))

    return make


def test_strength_0_gives_the_image_of_the_base_whatever_was_applied_before(sample, adapter):
    base, full = sample().tobytes(), sample((adapter, 1.0)).tobytes()
    assert sample((adapter, 0.0)).tobytes() == sample().tobytes() == base
    assert sample((adapter, 1.0)).tobytes() == full


def test_every_strength_gives_another_image(sample, adapter):
    images = {sample((adapter, strength)).tobytes() for strength in (-1.0, 0.0, 0.5, 1.0, 2.0)}
    assert len(images) == 5


def test_the_text_strength_applies_to_the_text_encoders_only(sample, adapter):
    """None means the same strength as in the denoiser."""
    same = sample((adapter, 1.0, None)).tobytes()
    assert sample((adapter, 1.0, 1.0)).tobytes() == same
    assert sample((adapter, 1.0, 0.0)).tobytes() != same
    assert sample((adapter, 0.0, 1.0)).tobytes() != sample().tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"prompt": "x"},
        {"negative_prompt": "y"},
        {"inference_steps": 3},
        {"guidance_scale": 3.0},
        {"width": 24},
    ],
)
def test_every_setting_changes_the_image(sample, changes):
    assert sample(**changes).tobytes() != sample().tobytes()


def test_width_and_height_are_the_size_of_the_image(sample):
    assert sample(width=24, height=32).size == (24, 32)
    assert sample(width=25, height=33).size == (24, 32)


def test_every_sampler_gives_another_image_and_leaves_no_state(sample):
    names = config.choices(dict(config.fields())["sampling.sampler"])
    assert set(names) == {"auto", *SAMPLERS}
    images = {name: sample(inference_steps=4, sampler=name) for name in names}
    auto = images["auto"].tobytes()
    assert images["DPM++ 2M"].tobytes() == auto == sample(inference_steps=4).tobytes()
    assert len({image.tobytes() for image in images.values()}) == len(SAMPLERS)
    assert "Sampler: Euler a" in images["Euler a"].text["parameters"]


def test_an_unknown_sampler_is_refused_with_the_known_ones(sample):
    with pytest.raises(ModelError, match="the sampler PLMS. Choose one of: DPM"):
        sample(sampler="PLMS")


def test_a_schedule_that_ends_in_pure_noise_allows_only_samplers_that_start_there(sample, base_of):
    base = Base(model=str(base_of("sdxl-v")))
    message = "does not support the sampler Heun. Choose one of: DPM[^.]*UniPC"
    with pytest.raises(ModelError, match=message):
        sample(base=base, sampler="Heun")
    pipe = load_base(base, torch.float32).pipe
    for choice in compatible_samplers(pipe).values():
        scheduler = choice.scheduler.from_config(pipe.scheduler.config, **choice.options)
        assert float(scheduler.alphas_cumprod[-1]) < 1e-6


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (1.5305, 0.0609), (2.0, -3.0)])
def test_latents_are_divided_by_the_scale_and_shifted_before_decoding(
    tiny_base, monkeypatch, scale, shift
):
    """The inverse of (latents - shift) * scale, with which training encodes an image."""
    base = load_base(Base(model=str(tiny_base)), torch.float32)
    vae = base.pipe.vae
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    decoded = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **given: decoded.append(z) or decode(z, **given))
    settings = {"prompt": "a", "negative_prompt": "", "inference_steps": 1, "guidance_scale": 7.0}
    image = generate(base, **settings, seed=1, sampler="DDIM")
    base.pipe.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config)
    latents = base.pipe(
        prompt="a",
        num_inference_steps=1,
        guidance_scale=7.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    torch.testing.assert_close(decoded[0], latents / scale + (shift or 0.0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = decode(latents / scale + (shift or 0.0)).sample[0]
    pixels = (expected.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).mul(255)
    difference = np.asarray(image, dtype=np.float32) - pixels.numpy()
    assert np.abs(difference).max() <= 1


def test_an_image_contains_its_settings(sample, adapter):
    text = sample((adapter, 0.8), negative_prompt="fog", seed=7).text["parameters"]
    prompt, negative, settings = text.split("\n")
    assert (prompt, negative) == ("image number 1", "Negative prompt: fog")
    for part in ("Steps: 2", "Sampler: DPM++ 2M", "Seed: 7", "CFG scale: 7", "Lora: tiny: 0.8"):
        assert part in settings


def test_the_sample_of_a_run_can_be_repeated_from_its_saved_file(train_tiny, sample):
    folder = train_tiny({"dataset.resolution": 16, "saving.precision": "fp32"})
    status = run_status.read_status(folder)
    shown = Image.open(folder / status.samples[-1].file)
    file, prompt = str(folder / status.finished.file), status.samples[-1].prompt
    again = sample((file, 1.0), prompt=prompt, width=16, height=16)
    difference = np.asarray(shown, dtype=int) - np.asarray(again, dtype=int)
    assert np.abs(difference).max() <= 1


def test_serving_answers_every_line_and_continues_after_invalid_ones(tiny_base, tmp_path):
    valid = {
        "prompt": "a",
        "target": str(tmp_path / "a.png"),
        "base": {"model": str(tiny_base)},
        "inference_steps": 1,
    }
    requests = [
        "not json",
        json.dumps([]),
        json.dumps({"prompt": "a"}),
        json.dumps(valid | {"adapters": [{"file": "/etc/passwd"}]}),
        json.dumps(valid | {"base": {"model": "/nowhere"}}),
        json.dumps(valid),
    ]
    replies = io.StringIO()
    serve(io.StringIO("\n".join(requests) + "\n"), replies)
    answers = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [list(answer)[0] for answer in answers] == ["error"] * 5 + ["file"]
    assert "passwd is not a usable .safetensors" in answers[3]["error"]
    assert Image.open(answers[5]["file"]).format == "PNG"


def test_an_adapter_of_another_base_is_refused(tmp_path, sample):
    path = tmp_path / "other.safetensors"
    save_file(kohya_tensors(*random_pair(outputs=77, inputs=99), alpha=2.0), path)
    message = (
        "does not fit the base model base .Stable Diffusion 1.x.: it was trained on another one. "
        "Its unet.down_blocks.*attn1.to_q has another size"
    )
    with pytest.raises(ModelError, match=message):
        sample((str(path), 1.0))
