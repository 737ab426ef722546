"""Stable Diffusion 3: three text encoders, flow matching, joint attention and sharded weights."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models import attention_processor
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from trainer import config
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter
from trainer.models import attention, model_files
from trainer.runs import events, run_folder, run_status
from trainer.training import estimate, setup
from trainer.training.runner import run_in
from trainer.training.step import optimizer_step
from trainer.training.step.losses import microbatch_losses

KINDS = ["sd3", "sd35-medium"]  # with T5, and without it but with the second attention


@pytest.fixture
def copy_of(base_of, tmp_path):
    """Returns a function that copies a kind of base, so that a test can change it."""
    return lambda kind: shutil.copytree(base_of(kind), tmp_path / "model")


def load(folder, **base):
    return load_base(config.Base(model=str(folder), **base), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_as_by_the_pipeline(base_of, kind):
    base = load(base_of(kind))
    ours = base.family.encode_prompts(base.pipe, ["a red star, żółć", ""])
    embeds, no_embeds, pooled, no_pooled = base.pipe.encode_prompt(
        "a red star, żółć", None, None, device="cpu"
    )
    torch.testing.assert_close(
        ours,
        {
            "prompt_embeds": torch.cat([embeds, no_embeds]),
            "pooled_prompt_embeds": torch.cat([pooled, no_pooled]),
        },
    )
    assert ours["prompt_embeds"].shape == (2, 77 + 256, 64)
    has_t5 = kind == "sd3"
    assert bool(ours["prompt_embeds"][:, 77:].any()) == has_t5


def test_without_t5_captions_are_encoded_with_clip_alone(base_of, tiny_run):
    whole, without = load(base_of("sd3")), load(base_of("sd3"), t5=False)
    assert without.pipe.text_encoder_3 is None and list(
        without.family.text_encoders(without.pipe)
    ) == ["text_encoder", "text_encoder_2"]
    first, second = (
        base.family.encode_prompts(base.pipe, ["a"])["prompt_embeds"] for base in (whole, without)
    )
    assert (
        torch.equal(first[:, :77], second[:, :77])
        and first[:, 77:].any()
        and not second[:, 77:].any()
    )
    assert setup.base_hashes(whole)[1] != setup.base_hashes(without)[1], (
        "else a cached caption of the one would serve the other"
    )
    limits = [base.family.token_counts(base.pipe, ["a b"])[1] for base in (whole, without)]
    assert limits == [255, 75]
    sizes = [
        estimate.size_of(tiny_run({"base.model": str(base_of("sd3")), "base.t5": t5})).text_encoders
        for t5 in (True, False)
    ]
    assert sizes[0] > sizes[1] > 0


def test_a_missing_t5_is_refused_unless_the_settings_train_without_it(copy_of):
    folder = copy_of("sd3")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(ModelError, match="lacks its text_encoder_3 .*set base.t5 to false"):
        load(folder)
    assert load(folder, t5=False).pipe.text_encoder_3 is None


def test_a_model_downloaded_without_t5_is_not_complete_for_settings_with_t5(copy_of, monkeypatch):
    folder = copy_of("sd3")
    shutil.rmtree(folder / "text_encoder_3")
    monkeypatch.setattr(
        model_files, "try_to_load_from_cache", lambda *a, **k: str(folder / "model_index.json")
    )
    model = "someone/stable-diffusion-3"
    assert model_files.locate(config.Base(model=model, t5=False)) == folder
    assert model_files.locate(config.Base(model=model, t5=True)) is None


def test_the_loss_is_flow_matching_on_shifted_and_scaled_latents(base_of, tiny_run, monkeypatch):
    """The loss is the mean of (model - (noise - latents))^2.

    Its input is (1 - sigma) latents + sigma noise, with latents = (VAE - shift) * scale.
    """
    run = tiny_run({"base.model": str(base_of("sd3")), "dataset.caption_dropout": 0.0})
    folder = run_folder.create(run)
    session, seen = setup.prepare(run, folder, events.EventLog(folder / "events.jsonl")), []
    real = session.model.predict

    def recording(*given):
        seen.append((*given, real(*given)))
        return seen[-1][-1]

    session.model = replace(session.model, predict=recording)
    sure = [
        replace(e, views=type(e.views)(replace(v, std=torch.zeros_like(v.std)) for v in e.views))
        for e in session.data.examples
    ]
    session.data = replace(session.data, examples=sure)
    loss = sum(microbatch_losses(session, 0))
    noised, batch, model_pred = seen[0]
    means = [(view.mean - 0.0609) * 1.5305 for e in session.data.examples for view in e.views]
    assert all(
        any(torch.allclose(latents, mean) for mean in means if mean.shape == latents.shape)
        for latents in batch.latents
    )
    sigma = noised.timesteps.view(-1, 1, 1, 1) / 1000
    noise = (noised.noisy_latents - (1 - sigma) * batch.latents) / sigma
    torch.testing.assert_close(
        loss, (model_pred - (noise - batch.latents)).square().mean(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_resume_after_a_crash_gives_identical_weights(base_of, tiny_run, monkeypatch, kind):
    run = tiny_run(
        {
            "base.model": str(base_of(kind)),
            "training.steps": 4,
            "saving.saves": 1,
            "training.text_encoder_learning_rate": 1e-3,
        }
    )
    whole, cut = run_folder.create(run), run_folder.create(run)
    assert run_in(whole) == 0
    real, calls = optimizer_step.microbatch_losses, iter(range(1, 100))
    with monkeypatch.context() as patched:
        patched.setattr(
            optimizer_step,
            "microbatch_losses",
            lambda *a: real(*a) if next(calls) < 4 else torch.zeros(1)[5],
        )
        assert run_in(cut) == 1
    assert not run_status.read_status(cut).finished
    assert run_in(cut) == 0 and run_status.read_status(cut).started.step == 2
    first, second = (
        load_file(folder / run_status.read_status(folder).finished.file) for folder in (whole, cut)
    )
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_strength_zero_gives_the_image_of_the_base_and_the_metadata_names_euler(
    base_of, tiny_run, tmp_path
):
    run = tiny_run(
        {"base.model": str(base_of("sd35-medium")), "training.steps": 2, "saving.saves": 1}
    )
    folder = run_folder.create(run)
    assert run_in(folder) == 0
    file = str(folder / run_status.read_status(folder).finished.file)
    sampler, pictures = Sampler(), {}
    for name, adapters in (
        ("base", []),
        ("one", [(file, 1.0)]),
        ("zero", [(file, 0.0)]),
        ("minus", [(file, -1.0)]),
    ):
        stack = [StackedAdapter(*adapter) for adapter in adapters]
        request = SampleRequest(
            "a star",
            str(tmp_path / f"{name}.png"),
            run.base,
            stack,
            inference_steps=2,
            width=22,
            height=16,
        )
        pictures[name] = Image.open(sampler.render(request))
    assert pictures["base"].size == (20, 16), "whole patches of two latents of two pixels"
    assert pictures["base"].tobytes() == pictures["zero"].tobytes()
    assert len({picture.tobytes() for picture in pictures.values()}) == 3
    assert "Sampler: Euler, " in pictures["one"].text["parameters"]


def test_image_sizes_that_are_not_whole_patches_are_refused(tmp_path, tiny_run):
    from tests import tiny

    torch.manual_seed(0)
    tiny.tiny_sd3(tmp_path / "work", t5=False, patch_size=8, sample_size=16).save_pretrained(
        tmp_path / "model"
    )
    folder = run_folder.create(tiny_run({"base.model": str(tmp_path / "model")}))
    assert run_in(folder) == 1
    assert (
        "dataset.bucket_step (8) must be a multiple of 16 for Stable Diffusion 3 Medium"
        in run_status.read_status(folder).message
    )


def shard(folder, part, size):
    """Saves a part's weights as several files with an index, as large models are published."""
    pipe = load(folder).pipe
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    getattr(pipe, part).save_pretrained(folder / part, max_shard_size=size)


def test_sharded_weights_are_loaded_whole(base_of, copy_of):
    folder = copy_of("sd3")
    shard(folder, "transformer", "200KB")
    shard(folder, "text_encoder_3", "100KB")
    inspected = model_files.inspect(folder)
    assert (
        len(inspected.weights["transformer"]) > 1 and len(inspected.weights["text_encoder_3"]) > 1
    )
    assert inspected.tensors == model_files.inspect(base_of("sd3")).tensors
    whole, parts = load(base_of("sd3")), load(folder)
    for part in ("transformer", "text_encoder_3"):
        for ours, theirs in zip(
            getattr(whole.pipe, part).parameters(),
            getattr(parts.pipe, part).parameters(),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


BROKEN_INDEX = {
    "missing_part": (lambda index: None, "are missing"),
    "elsewhere": (
        lambda index: index["weight_map"].update(x="../../vae/diffusion_pytorch_model.safetensors"),
        "names ../../vae",
    ),
    "no_file": (lambda index: index.update(weight_map={}), "names no file"),
    "no_table": (lambda index: index.update(weight_map=[1]), "names no file"),
}


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_a_broken_shard_index_is_refused(case, copy_of):
    folder, (spoil, words) = copy_of("sd35-medium"), BROKEN_INDEX[case]
    shard(folder, "transformer", "200KB")
    path = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    if case == "missing_part":
        (folder / "transformer" / sorted(index["weight_map"].values())[0]).unlink()
    spoil(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words):
        model_files.inspect(folder)


@pytest.fixture
def pretend_xformers(monkeypatch):
    """Replaces the kernel of xformers by torch's attention on the CPU.

    Diffusers tests xformers on a GPU before it uses it.
    """

    def torch_attention(query, key, value, attn_bias=None, op=None, scale=None):
        return scaled_dot_product_attention(query, key, value, scale=scale)

    monkeypatch.setattr(
        attention_processor,
        "xformers",
        SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=torch_attention)),
    )
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *a, **k: real(*a, **k | ({"device": "cpu"} if "device" in k else {}))
    )


def test_xformers_replaces_joint_attention_with_the_same_results(pretend_xformers):
    """The model has attention over image and text, and a second one over the image alone."""
    torch.manual_seed(0)
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
    }
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
        **shape,
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 16, requires_grad=True),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([500.0]),
    }

    def run():
        output = model(**inputs).sample
        return output.detach(), *torch.autograd.grad(
            output.square().sum(), inputs["encoder_hidden_states"]
        )

    by_torch = run()
    attention.use_attention(model, "xformers")
    assert {type(processor) for processor in model.attn_processors.values()} == {
        attention_processor.XFormersJointAttnProcessor
    }
    torch.testing.assert_close(run(), by_torch)
