"""Every family on a tiny real pipeline: recognised, told what its denoiser wants, trained, and saved so that diffusers reads it whole."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import TINY, save_tiny_base
from trainer import config
from trainer.errors import ModelError
from trainer.families import FAMILIES, families_of_adapter, family_of, load_base
from trainer.families.base import Batch
from trainer.families.objective import Noised
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter
from trainer.lora import inject, metadata, targets, writer
from trainer.lora.formats.keys import diffusers_key
from trainer.lora.formats.reader import read_adapter
from trainer.models import hub, model_files
from trainer.models.safetensors_header import read_header
from trainer.runs import events, run_folder, run_status
from trainer.training import estimate, loop, setup, validation
from trainer.training.optimizers import set_learning_rate
from trainer.training.step.losses import microbatch_losses

FAMILY_OF = {"sd1": "sd1", "sd2": "sd2", "sd2-v": "sd2", "sdxl": "sdxl", "sdxl-v": "sdxl"}
FAMILY_OF |= {"sd3": "sd3m", "sd35-medium": "sd35m", "sd35-large": "sd35l"}
NEW = [kind for kind in TINY if kind != "sd1"]  # the other tests stand on sd1
LAST = {FAMILY_OF[kind]: kind for kind in NEW}.values()  # one of each family

PROJECTIONS = [
    f"{attention}_{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out_0")
]
TEXT_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def unet_keys(places, depth):
    """Written out from the table of the format, independent of the code."""
    return {
        f"lora_unet_{place}_transformer_blocks_{block}_{projection}"
        for place in places
        for block in range(depth)
        for projection in PROJECTIONS
    }


def text_keys(*prefixes):
    return {
        f"{prefix}_text_model_encoder_layers_{layer}_self_attn_{projection}"
        for prefix in prefixes
        for layer in (0, 1)
        for projection in TEXT_PROJECTIONS
    }


def transformer_keys(dual=()):
    """Of two blocks, the last of which gives no text on, so that the text's stream has no way out of its attention."""
    image, text = ["to_q", "to_k", "to_v", "to_out.0"], ["add_q_proj", "add_k_proj", "add_v_proj"]
    keys = {
        f"transformer_blocks.{block}.attn.{projection}"
        for block in (0, 1)
        for projection in image + text
    }
    keys |= {
        f"transformer_blocks.{block}.attn2.{projection}" for block in dual for projection in image
    }
    keys.add("transformer_blocks.0.attn.to_add_out")
    encoders = ["text_encoder", "text_encoder_2"]
    layers = [
        f"text_model.encoder.layers.{layer}.self_attn.{projection}"
        for layer in (0, 1)
        for projection in TEXT_PROJECTIONS
    ]
    return {f"transformer.{key}" for key in keys} | {
        f"{encoder}.{layer}" for encoder in encoders for layer in layers
    }


ONE_ENCODER = unet_keys(
    [
        "down_blocks_0_attentions_0",
        "mid_block_attentions_0",
        "up_blocks_1_attentions_0",
        "up_blocks_1_attentions_1",
    ],
    depth=1,
) | text_keys("lora_te")
XL_PLACES = [
    "input_blocks_4_1",
    "input_blocks_5_1",
    "middle_block_1",
    "output_blocks_0_1",
    "output_blocks_1_1",
    "output_blocks_2_1",
]
GOLDEN = {
    "sd1": ONE_ENCODER,
    "sd2": ONE_ENCODER,
    "sdxl": unet_keys(XL_PLACES, depth=2) | text_keys("lora_te1", "lora_te2"),
}
GOLDEN |= {
    "sd3m": transformer_keys(),
    "sd35m": transformer_keys(dual=[0]),
    "sd35l": transformer_keys(),
}
ENDS = {
    "kohya": ("lora_down.weight", "lora_up.weight", "alpha"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """Kind -> folder of its tiny base, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = save_tiny_base(tmp_path_factory.mktemp(kind) / "base", kind=kind)
        return made[kind]

    return get


@pytest.fixture
def load(base_of):
    return lambda kind: load_base(config.Base(model=str(base_of(kind))), torch.float32)


@pytest.fixture
def session_of(base_of, tiny_run):
    def make(kind, **changes):
        run = tiny_run({"base.model": str(base_of(kind)), "dataset.caption_dropout": 0.0} | changes)
        folder = run_folder.create(run)
        return setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))

    return make


def train_steps(session, count):
    set_learning_rate(session.optimizer, 1.0)
    for number in range(1, count + 1):
        loop.forward_backward(
            session, session.buckets, number, torch.amp.GradScaler("cpu", enabled=False)
        )
        session.optimizer.step()
        session.optimizer.zero_grad()


@torch.no_grad()
def predict(family, pipe):
    channels = pipe.vae.config.latent_channels
    latents = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        latents,
        family.encode_prompts(pipe, ["a red star, żółć", ""]),
        torch.tensor([[40.0, 24.0, 8.0, 0.0, 16.0, 24.0]]).repeat(2, 1),
    )
    return family.predict(
        family.denoiser(pipe), Noised(latents, torch.tensor([400, 20]), latents), batch
    )


@pytest.mark.parametrize("kind", TINY)
def test_the_family_is_told_by_the_folder(base_of, kind):
    base = load_base(config.Base(model=str(base_of(kind))), torch.float32)
    assert family_of(base.files) is FAMILIES[FAMILY_OF[kind]]
    assert [name for name, family in FAMILIES.items() if family.matches_base(base.files)] == [
        FAMILY_OF[kind]
    ], "one family, not two"
    trained = list(base.family.trainable_text_encoders(base.pipe))
    assert base.files.trainable_text_encoders == trained, (
        "the page counts by the files what is trained"
    )


@pytest.mark.parametrize("kind", TINY)
def test_a_wider_choice_of_layers_is_wider(base_of, kind):
    files = model_files.inspect(base_of(kind))
    shapes = targets.projections(files.tensors[files.denoiser])
    attention, feed_forward, linear = (
        targets.choose_targets(config.Adapter(targets=choice), files.denoiser, shapes)
        for choice in ("attention", "attention+feed-forward", "linear")
    )
    assert 0 < len(attention) < len(feed_forward) < len(linear)


@pytest.mark.parametrize("kind", NEW)
def test_what_was_trained_is_what_diffusers_reads(base_of, session_of, tmp_path, kind):
    """A few steps with all text encoders, alpha other than rank; the file in a fresh pipeline: no key missing or left, same effect."""
    session = session_of(
        kind,
        **{
            "adapter.rank": 3,
            "adapter.alpha": 5.0,
            "training.learning_rate": 2e-2,
            "training.text_encoder_learning_rate": 2e-2,
        },
    )
    family = session.base.family
    assert sum(p.numel() for p in session.parameters.values()) == estimate.trainable_parameters(
        session.run
    )
    plain = predict(family, session.base.pipe)
    train_steps(session, 3)
    trained = predict(family, session.base.pipe)

    modules = list(inject.adapted_modules(session.components))
    tensors = writer.WRITERS[family.dialect](modules, family, torch.float32)
    ends = ENDS[family.dialect]
    assert set(tensors) == {f"{key}.{end}" for key in GOLDEN[FAMILY_OF[kind]] for end in ends}
    writer.save_adapter(
        tmp_path / "a.safetensors", family.dialect, modules, family, torch.float32, {}
    )
    writer.save_adapter(tmp_path / "k.safetensors", "kohya", modules, family, torch.float32, {})
    writer.verify(tmp_path / "k.safetensors", modules)
    told = families_of_adapter(read_adapter(tmp_path / "a.safetensors"))
    assert not told or family.name in told, (
        "a file without metadata is not taken for another family's"
    )
    left_out = dict.fromkeys(session.base.files.left_out)
    fresh = family.pipeline_class.from_pretrained(
        base_of(kind), **family.pipeline_options, **left_out
    )
    fresh.load_lora_weights(str(tmp_path / "a.safetensors"))
    parts = {family.denoiser_name: family.denoiser(fresh), **family.text_encoders(fresh)}
    loaded = list(inject.adapted_modules(parts, "default_0"))
    key = {"kohya": family.export_key, "diffusers": diffusers_key}[family.dialect]
    assert {key(m.component, m.name) for m in loaded} == GOLDEN[FAMILY_OF[kind]] and len(
        tensors
    ) == len(ends) * len(loaded)
    assert (trained - plain).norm() > 0.02 * plain.norm()
    torch.testing.assert_close(predict(family, fresh), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", LAST)
def test_a_whole_run_with_samples_and_a_preview_of_its_file(base_of, train_tiny, tmp_path, kind):
    folder = train_tiny(
        {
            "base.model": str(base_of(kind)),
            "training.text_encoder_learning_rate": 1e-2,
            "training.steps": 3,
            "saving.saves": 1,
        }
    )
    status = run_status.read_status(folder)
    file = folder / status.finished.file
    assert (
        [s.step for s in status.samples] == [0, 3]
        and not status.warnings
        and not read_adapter(file).notes
    )
    assert {
        name.rsplit(".lora_", 1)[0].removesuffix(".alpha") for name in load_file(file)
    } == GOLDEN[FAMILY_OF[kind]]
    base = load_base(config.Base(model=str(base_of(kind))), torch.float32)
    prediction = base.family.objective(base.pipe).prediction_type
    assert read_header(file).metadata["modelspec.prediction_type"] == {"v_prediction": "v"}.get(
        prediction, prediction
    )
    sampler, pictures = Sampler(), []
    for strength in (0.0, 1.0):
        target, adapter = str(tmp_path / f"{strength}.png"), StackedAdapter(str(file), strength)
        pictures.append(
            Image.open(
                sampler.render(
                    SampleRequest(
                        "picture number 1",
                        target,
                        config.Base(model=str(base_of(kind))),
                        [adapter],
                        inference_steps=2,
                    )
                )
            )
        )
    assert pictures[0].size == (16, 16) and pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl-v"])
def test_v_prediction_is_the_target_where_the_base_says_so(session_of, monkeypatch, kind):
    """v = alpha noise - sigma latents (Salimans & Ho 2022, section 4), with the base's own, perhaps rescaled, schedule."""
    session, seen = session_of(kind, **{"objective.min_snr_gamma": 0.0}), []
    real = session.predict
    monkeypatch.setattr(session, "predict", lambda *a: seen.append((*a, real(*a))) or seen[-1][-1])
    loss = sum(microbatch_losses(session, session.buckets, 0))
    noised, batch, model_pred = seen[0]
    alpha_bar = session.base.pipe.scheduler.alphas_cumprod[noised.timesteps].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noise = (noised.noisy_latents - alpha * batch.latents) / sigma
    target = alpha * noise - sigma * batch.latents
    torch.testing.assert_close(noised.target, target, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss, (model_pred - target).square().mean(), rtol=1e-3, atol=1e-4)


def test_sdxl_is_told_the_crop_that_was_made(session_of, tmp_path):
    """A 48 x 24 picture cut to a square in its middle, and one 16 x 24 that is enlarged to 24 x 36 and cut above and below."""
    for name, size in (("wide", (48, 24)), ("tall", (16, 24))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    session = session_of(
        "sdxl",
        **{
            "dataset.folder": str(tmp_path),
            "dataset.resolution": 24,
            "dataset.max_aspect": 1.0,
            "dataset.allow_upscale": True,
        },
    )
    assert [e.views[0].size_ids for e in session.examples] == [
        (24, 16, 6, 0, 24, 24),
        (24, 48, 0, 12, 24, 24),
    ]
    seen = []
    session.base.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    sum(microbatch_losses(session, session.buckets, 0))
    assert sorted(seen[0]["time_ids"].tolist()) == [
        [24, 16, 6, 0, 24, 24],
        [24, 48, 0, 12, 24, 24],
    ] and seen[0]["text_embeds"].shape == (
        2,
        24,
    )
    validation.validation_losses(session)
    assert seen[1]["time_ids"].tolist() == [[24, 16, 6, 0, 24, 24]] * validation.VALIDATION_TIMESTEPS


def test_sdxl_encodes_prompts_as_its_pipeline_does(load):
    base = load("sdxl")
    ours = base.family.encode_prompts(base.pipe, ["a red star", ""])
    embeds, no_embeds, pooled, no_pooled = base.pipe.encode_prompt(
        "a red star", device="cpu", do_classifier_free_guidance=True
    )
    torch.testing.assert_close(
        ours,
        {
            "prompt_embeds": torch.cat([embeds, no_embeds]),
            "pooled_prompt_embeds": torch.cat([pooled, no_pooled]),
        },
    )
    assert not ours["prompt_embeds"][1].any() and not ours["pooled_prompt_embeds"][1].any()
    base.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert base.family.encode_prompts(base.pipe, [""])["prompt_embeds"].any()


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_no_projection_of_an_open_clip_encoder_is_alone(load, kind):
    """A1111 fuses q, k, v, out of these encoders and passes over an attention that lacks one."""
    base = load(kind)
    name, encoder = list(base.family.text_encoders(base.pipe).items())[-1]
    inject.inject(encoder, name, config.Adapter(), seed=1)
    by_attention = {}
    for module in inject.adapted_modules({name: encoder}):
        attention, projection = module.name.rsplit(".", 1)
        by_attention.setdefault(attention, set()).add(projection)
    assert len(by_attention) == 2 and all(
        projections == set(TEXT_PROJECTIONS) for projections in by_attention.values()
    )


@pytest.mark.parametrize(
    "family, prediction_type, version, v2, architecture",
    [
        ("sd1", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "v_prediction", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_file_says_its_family(family, prediction_type, version, v2, architecture):
    values = metadata.metadata_for(
        config.RunConfig(),
        FAMILIES[family],
        step=1,
        total_steps=1,
        modules=[],
        sizes=[(16, 16)],
        captions=[],
        base_hash="",
        prediction_type=prediction_type,
        started=1.0,
        finished=2.0,
    )
    assert (values["ss_base_model_version"], values["ss_v2"], values["modelspec.architecture"]) == (
        version,
        v2,
        architecture,
    )
    assert values["modelspec.prediction_type"] == (
        "v" if prediction_type == "v_prediction" else "epsilon"
    )


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = {
    "encoder_of_another_class": (
        lambda d: edit_json(
            d / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]
        ),
        "must be CLIPTextModelWithProjection",
    ),
    "encoder_that_runs_code": (
        lambda d: edit_json(d / "model_index.json", text_encoder_2=["os", "system"]),
        "names .* as text_encoder_2",
    ),
    "image_encoder_that_runs_code": (
        lambda d: edit_json(d / "model_index.json", image_encoder=["evil", "Encoder"]),
        None,
    ),
    "no_second_encoder": (
        lambda d: (d / "text_encoder_2/model.safetensors").unlink(),
        "weights text_encoder_2/.* missing",
    ),
    "no_second_vocabulary": (
        lambda d: [path.unlink() for path in (d / "tokenizer_2").iterdir()],
        "no vocabulary",
    ),
    "smaller_unet": (
        lambda d: edit_json(d / "unet/config.json", layers_per_block=1),
        "with another UNet than those that can be trained",
    ),
    "refiner": (
        lambda d: edit_json(d / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
        "is a StableDiffusionXLImg2ImgPipeline",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_sdxl_folder_is_refused_in_a_sentence(case, base_of, tmp_path, monkeypatch):
    """What no training needs is left out unread, whatever it names."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = shutil.copytree(base_of("sdxl"), tmp_path / "model")
    spoil, words = REFUSED[case]
    spoil(folder)
    if words is None:
        load_base(config.Base(model=str(folder)), torch.float32)
    else:
        with pytest.raises(ModelError, match=words) as error:
            load_base(config.Base(model=str(folder)), torch.float32)
        assert str(error.value).endswith(".")
    assert not (tmp_path / "PWNED").exists()


def test_only_what_is_used_is_downloaded():
    """Of the repository of SDXL, which also holds single files, two older VAEs and three other formats."""
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/merges.txt",
        "tokenizer_2/vocab.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    other = [
        "sd_xl_base_1.0.safetensors",
        "sd_xl_offset_example-lora_1.0.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.onnx",
        "unet/openvino_model.bin",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "vae_decoder/config.json",
        "text_encoder/flax_model.msgpack",
        "safety_checker/model.safetensors",
    ]
    assert (
        sorted(hub.wanted_files(wanted + other)) == sorted(wanted)
        and hub.wanted_files(wanted)[-1] == "model_index.json"
    )


XL_UNET = {  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def test_sdxl_in_full_size_has_stabilitys_keys():
    """70 transformer blocks of 8 projections, where Stability's UNet has them (sd_xl_base.yaml: depth 2 at 640 channels, 10 at 1280)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**XL_UNET)
    family = FAMILIES["sdxl"]
    projections = [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(targets.ATTENTION)
    ]
    keys = {name: family.export_key("unet", name) for name in projections}
    expected = unet_keys(
        [
            "input_blocks_4_1",
            "input_blocks_5_1",
            "output_blocks_3_1",
            "output_blocks_4_1",
            "output_blocks_5_1",
        ],
        depth=2,
    )
    expected |= unet_keys(
        [
            "input_blocks_7_1",
            "input_blocks_8_1",
            "middle_block_1",
            "output_blocks_0_1",
            "output_blocks_1_1",
            "output_blocks_2_1",
        ],
        depth=10,
    )
    assert len(projections) == 560 and set(keys.values()) == expected and len(expected) == 560
    by_hand = {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k",
        "mid_block.attentions.0.transformer_blocks.3.attn1.to_out.0": "lora_unet_middle_block_1_transformer_blocks_3_attn1_to_out_0",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_v": "lora_unet_output_blocks_2_1_transformer_blocks_0_attn2_to_v",
        "up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "lora_unet_output_blocks_3_1_transformer_blocks_1_attn1_to_q",
    }
    assert {name: keys[name] for name in by_hand} == by_hand
