"""Base models in one .safetensors file: reading, loading and training them without network."""

import json
import re
import shutil
import socket

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests import ldm
from trainer import config
from trainer.cli.describe import describe
from trainer.errors import ConfigError, ModelError
from trainer.families import FAMILIES, from_single_file, load_base
from trainer.inference.samples import generate
from trainer.models import model_files
from trainer.models.safetensors_header import TensorInfo
from trainer.models.single_file import configs, kinds, reading, tensor_names
from trainer.runs import run_status
from trainer.training import estimate

MARKER = torch.tensor([])  # v_pred and ztsnr are names without data


def without_text_model(shapes):
    """Returns the shapes with the level `text_model`, which not every encoder has, removed."""
    return {name.removeprefix("text_model."): shape for name, shape in shapes.items()}


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


KEY_GROUPS = {
    "sd1": {"unet", "te"},
    "sdxl": {"unet", "te1", "te2"},
    "sd35m": {"transformer", "text_encoder", "text_encoder_2"},
}


@pytest.mark.parametrize("kind", KEY_GROUPS)
def test_training_from_a_single_file_needs_no_network(single_file_of, train_tiny, no_network, kind):
    folder = train_tiny(
        {
            "base.model": str(single_file_of(kind)),
            "training.text_encoder_learning_rate": 1e-2,
            "training.steps": 2,
            "saving.saves": 1,
        }
    )
    status = run_status.read_status(folder)
    assert [sample.step for sample in status.samples] == [0, 2]
    assert not status.warnings
    keys = load_file(folder / status.finished.file)
    separator, position = (".", 0) if kind == "sd35m" else ("_", 1)
    assert {key.split(separator)[position] for key in keys} == KEY_GROUPS[kind]
    run = config.load(folder / "run.toml")
    assert status.started.trainable_parameters == estimate.trainable_parameters(run)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_tensor_of_a_file_has_its_name_and_shape_in_the_pipeline(single_file_of, kind):
    files = model_files.inspect(single_file_of(kind))
    prediction = "v" if kind == "sd2" else "auto"
    base = load_base(config.Base(model=str(files.path), prediction=prediction), torch.float32)
    assert base.family is FAMILIES[kind]
    assert base.pipe.vae.dtype == torch.float32
    for part in files.tensors:
        loaded = without_text_model(shapes_of(getattr(base.pipe, part)))
        read = {name: info.shape for name, info in files.tensors[part].items()}
        if part == "vae":  # its tensors keep their LDM names
            assert len(loaded) == len(read) > 0
            continue
        if kind == "sd2":
            read.pop("text_projection.weight", None)  # in the file, but not used by 2.x
        assert loaded == without_text_model(read)


@pytest.mark.parametrize(
    "kind, prefix, path",
    [
        ("sd2", ldm.SD2, "encoder.layers.1.self_attn"),
        ("sdxl", ldm.XL_2, "text_model.encoder.layers.1.self_attn"),
    ],
)
def test_fused_projections_of_a_text_encoder_are_split_in_order(single_file_of, kind, prefix, path):
    prediction = "v" if kind == "sd2" else "auto"
    model = str(single_file_of(kind))
    base = load_base(config.Base(model=model, prediction=prediction), torch.float32)
    stored = load_file(model)
    middle = stored[ldm.UNET + "middle_block.0.in_layers.2.weight"].float()
    assert torch.equal(base.pipe.unet.mid_block.resnets[0].conv1.weight, middle)
    fused = stored[prefix + "transformer.resblocks.1.attn.in_proj_weight"].float()
    encoder = list(base.family.text_encoders(base.pipe).values())[-1]
    layer = encoder.get_submodule(path)
    split = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
    assert torch.equal(split, fused)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_each_tokenizer_has_the_padding_that_its_encoder_was_trained_with(single_file_of, kind):
    base = load_base(config.Base(model=str(single_file_of(kind))), torch.float32)
    assert base.pipe.tokenizer.pad_token == "<|endoftext|>"
    assert base.pipe.tokenizer_2.pad_token == "!"


def full_size_tensors(template):
    """Returns the tensors of a published model by prefix, as its makers' code names them."""
    return {
        prefix: {name: TensorInfo("F16", shape) for name, shape in shapes.items()}
        for prefix, shapes in ldm.FULL[template].items()
    }


@pytest.mark.parametrize("template", ldm.FULL)
def test_shapes_of_the_full_unets_and_vaes_give_the_public_configurations(template):
    tensors = full_size_tensors(template)
    public_unet = configs.template_config(template, "unet/config.json")
    public_vae = configs.template_config(template, "vae/config.json")
    assert configs.unet_config(tensors[ldm.UNET], public_unet) == public_unet
    assert configs.vae_config(tensors[ldm.VAE], public_vae) == public_vae
    with torch.device("meta"):
        loaded = shapes_of(UNet2DConditionModel.from_config(public_unet))
        assert len(AutoencoderKL.from_config(public_vae).state_dict()) == len(ldm.FULL_VAE)
    shapes = ldm.FULL[template][ldm.UNET]
    named = {tensor_names.unet_name(name, 2): shape for name, shape in shapes.items()}
    assert named == loaded


@pytest.mark.parametrize(
    "template, part, prefix, encoder_class",
    [
        ("sd15", "text_encoder", ldm.SD1, CLIPTextModel),
        ("sd21", "text_encoder", ldm.SD2, CLIPTextModel),
        ("sdxl", "text_encoder", ldm.XL_1, CLIPTextModel),
        ("sdxl", "text_encoder_2", ldm.XL_2, CLIPTextModelWithProjection),
    ],
)
def test_shapes_of_the_full_text_encoders_give_the_public_configurations(
    template, part, prefix, encoder_class, tmp_path
):
    public = configs.template_config(template, f"{part}/config.json")
    named = tensor_names.text_encoder_tensors(full_size_tensors(template)[prefix])
    derived = configs.text_config(named, public)
    assert derived | {"projection_dim": 0} == public | {"projection_dim": 0}

    (tmp_path / "config.json").write_text(json.dumps(derived))
    with torch.device("meta"):
        loaded = shapes_of(encoder_class(AutoConfig.from_pretrained(tmp_path)))
    read = {name: info.shape for name, info in named.items()}
    if template == "sd21":  # neither its last layer nor its projection is used
        read = {name: shape for name, shape in read.items() if ".layers.23." not in name}
        del read["text_projection.weight"]
    assert without_text_model(loaded) == without_text_model(read)


@pytest.mark.parametrize("kind, family", [("sd3", "sd3m"), ("sd35m", "sd35m"), ("sd35l", "sd35l")])
def test_the_three_stable_diffusion_3_models_are_distinguished(single_file_of, kind, family):
    base = load_base(config.Base(model=str(single_file_of(kind))), torch.float32)
    assert base.family is FAMILIES[family]
    assert base.pipe.text_encoder_3 is None

    projection = re.compile(r".*\.attn2?\.(to|add)_.*")
    loaded = shapes_of(base.pipe.transformer)
    read = {name: info.shape for name, info in base.files.tensors["transformer"].items()}
    loaded = {name: shape for name, shape in loaded.items() if projection.match(name)}
    assert loaded == {name: shape for name, shape in read.items() if projection.match(name)}
    # Weight and bias of 8 projections, 7 in the last block, and 4 of a second attention.
    assert len(loaded) == 2 * (8 + 7 + 4 * (kind == "sd35m"))

    key = ldm.UNET + "joint_blocks.1.context_block.attn.qkv.weight"
    attention = base.pipe.transformer.transformer_blocks[1].attn
    projections = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
    split = torch.cat([projection.weight for projection in projections])
    assert torch.equal(split, load_file(base.files.path)[key].float())


FULL_SD3 = {
    "sd3m": {"width": 1536, "layers": 24, "context": 4096, "pooled": 2048, "side": 192},
    "sd35m": {
        "width": 1536,
        "layers": 24,
        "context": 4096,
        "pooled": 2048,
        "side": 384,
        "qk_norm": True,
        "second": range(13),
    },
    "sd35l": {
        "width": 2432,
        "layers": 38,
        "context": 4096,
        "pooled": 2048,
        "side": 192,
        "qk_norm": True,
    },
}


@pytest.mark.parametrize("template", FULL_SD3)
def test_shapes_of_stable_diffusion_3_give_its_public_configurations(template):
    shapes = ldm.mmdit(**FULL_SD3[template])
    tensors = {name: TensorInfo("F16", shape) for name, shape in shapes.items()}
    public = configs.template_config(template, "transformer/config.json")
    assert configs.transformer_config(tensors, public) == public


def test_the_tokenizer_equals_clips():
    tokenizer = from_single_file.clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    tokens = tokenizer("A  Zürich, 1999!").input_ids
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a zürich , 1 9 9 9 !"
    assert tokens[-3:-1] == [280, 256]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (49407, 77)
    assert from_single_file.clip_tokenizer("!").pad_token_id == 0


# Prediction type and zero terminal SNR


def inspect_changed(tmp_path, kind, **changes):
    """Writes a tiny single file with changes and inspects it."""
    path = ldm.write_single_file(tmp_path / "model.safetensors", kind, **changes)
    return model_files.inspect(path)


def architecture(name):
    return {"metadata": {"modelspec.architecture": name}}


@pytest.mark.parametrize(
    "kind, changes, prediction, zero_snr",
    [
        ("sd1", {}, "epsilon", None),
        ("sd1", {"metadata": {"modelspec.prediction_type": "v"}}, "v_prediction", None),
        ("sdxl", {"v_pred": MARKER}, "v_prediction", None),
        ("sdxl", {"v_pred": MARKER, "ztsnr": MARKER}, "v_prediction", True),
        ("sd2", {}, None, None),
        ("sd2", architecture("stable-diffusion-v2-768-v"), "v_prediction", None),
        ("sd2", architecture("stable-diffusion-v2-512"), "epsilon", None),
        ("sd2", {reading.SD2_PROBE: torch.tensor([0.2, -0.2, 0.1, -0.1])}, "v_prediction", None),
        ("sd2", {reading.SD2_PROBE: torch.tensor([0.02, -0.02, 0.01, -0.01])}, "epsilon", None),
    ],
)
def test_the_file_determines_its_prediction_type(tmp_path, kind, changes, prediction, zero_snr):
    scheduler = inspect_changed(tmp_path, kind, **changes).configs["scheduler"]
    assert scheduler["prediction_type"] == prediction
    assert scheduler.get("rescale_betas_zero_snr") == zero_snr


def test_v_prediction_with_zero_terminal_snr_reaches_the_objective(tmp_path):
    path = tmp_path / "noob.safetensors"
    ldm.write_single_file(path, "sdxl", v_pred=MARKER, ztsnr=MARKER)
    base = load_base(config.Base(model=str(path)), torch.float32)
    objective = base.family.objective(base.pipe)
    assert objective.prediction_type == "v_prediction"
    assert float(objective.alphas_cumprod[-1]) < 1e-7


def test_settings_override_the_prediction_of_a_file(tmp_path):
    path = tmp_path / "noob.safetensors"
    ldm.write_single_file(path, "sdxl", v_pred=MARKER, ztsnr=MARKER)
    epsilon = config.Base(model=str(path), prediction="epsilon", zero_terminal_snr="off")
    base = load_base(epsilon, torch.float32)
    objective = base.family.objective(base.pipe)
    assert objective.prediction_type == "epsilon"
    assert float(objective.alphas_cumprod[-1]) > 1e-3


def test_epsilon_prediction_with_zero_terminal_snr_is_refused(tmp_path):
    path = ldm.write_single_file(tmp_path / "noob.safetensors", "sdxl", v_pred=MARKER, ztsnr=MARKER)
    with pytest.raises(ModelError, match="impossible with zero terminal SNR"):
        load_base(config.Base(model=str(path), prediction="epsilon"), torch.float32)
    with pytest.raises(ConfigError, match="needs v prediction"):
        config.replace(
            config.RunConfig(), {"base.prediction": "epsilon", "base.zero_terminal_snr": "on"}
        )


def test_a_file_that_does_not_determine_its_prediction_needs_a_setting(single_file_of):
    with pytest.raises(ModelError, match="Nothing in sd2.safetensors determines whether"):
        load_base(config.Base(model=str(single_file_of("sd2"))), torch.float32)


def test_zero_terminal_snr_rescales_the_schedule_as_in_the_paper(tiny_base):
    """Lin et al. 2024, arXiv:2305.08891, algorithm 1."""
    settings = config.Base(model=str(tiny_base), prediction="v", zero_terminal_snr="on")
    base = load_base(settings, torch.float32)
    objective = base.family.objective(base.pipe)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(objective.alphas_cumprod.double(), rescaled, rtol=1e-4, atol=1e-6)
    assert objective.prediction_type == "v_prediction"


# Descriptions


def test_the_page_offers_presets_for_the_family_of_a_single_file(single_file_of):
    from app.tabs import train_form

    for kind, model in {"sd1": train_form.SD15, "sdxl": train_form.SDXL}.items():
        presets = train_form.presets_for(train_form.OWN, str(single_file_of(kind)))
        assert {preset.config.base.model for preset in presets} == {model}


def test_trainable_parameters_are_counted_from_the_header(single_file_of, tiny_run):
    run = tiny_run(
        {
            "base.model": str(single_file_of("sdxl")),
            "adapter.rank": 1,
            "training.text_encoder_learning_rate": 1e-4,
        }
    )
    projection = re.compile(
        r".*(attn\d\.to_(q|k|v|out\.0)|self_attn\.\w+_proj|attn\.out_proj)\.weight"
    )
    shapes = ldm.whole(ldm.TINY["sdxl"])
    separate = sum(sum(shape) for name, shape in shapes.items() if projection.match(name))
    fused = 2 * 3 * (48 + 48)  # query, key and value of the two layers of OpenCLIP
    assert estimate.trainable_parameters(run) == separate + fused


@pytest.mark.parametrize(
    "kind, changes, expected",
    [
        (
            "sd1",
            {},
            {
                "family": "Stable Diffusion 1.x",
                "prediction": "epsilon",
                "zero terminal SNR": "no",
                "made for": "128 x 128 pixels",
            },
        ),
        ("sd2", {}, {"family": "Stable Diffusion 2.x"}),
        (
            "sdxl",
            {"v_pred": MARKER, "ztsnr": MARKER},
            {"family": "Stable Diffusion XL", "prediction": "v", "zero terminal SNR": "yes"},
        ),
    ],
)
def test_info_describes_a_single_file(tmp_path, kind, changes, expected):
    description = describe(ldm.write_single_file(tmp_path / "model.safetensors", kind, **changes))
    assert description | expected == description
    assert description["layout"] == "a single file"
    if kind == "sd2":
        assert "set base.prediction" in description["prediction"]
    unet = ldm.TINY[kind][ldm.UNET]
    parameters = sum(torch.Size(shape).numel() for shape in unet.values())
    assert description["UNet"] == f"{parameters:,} parameters in F16"


def test_info_describes_a_folder_and_refuses_a_pickle(tiny_base, tmp_path):
    description = describe(tiny_base)
    assert description["layout"] == "a diffusers folder"
    assert description["family"] == "Stable Diffusion 1.x"
    assert description["prediction"] == "epsilon"
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(ModelError, match="pickle file"):
        describe(tmp_path / "model.ckpt")


def test_info_omits_the_image_size_if_the_configuration_has_none(tiny_base, tmp_path):
    assert "made for" in describe(tiny_base)
    folder = shutil.copytree(tiny_base, tmp_path / "sizeless")
    settings = json.loads((folder / "unet/config.json").read_text())
    settings.pop("sample_size")
    (folder / "unet/config.json").write_text(json.dumps(settings))
    assert "made for" not in describe(folder)


# Notes


def test_t5_of_a_single_file_is_not_used_and_the_user_is_informed(tmp_path):
    files = inspect_changed(tmp_path, "sd3", **{kinds.SD3_T5 + "shared.weight": torch.ones(2, 2)})
    assert "captions are read with CLIP alone" in files.notes[0]
    assert files.absent_parts == ["text_encoder_3", "tokenizer_3"]


def test_a_distilled_model_is_recognised_by_a_whole_word_of_its_name(tmp_path):
    turbo = ldm.write_single_file(tmp_path / "dreamshaperXL_turbo.safetensors", "sd1")
    assert "calls itself turbo" in model_files.inspect(turbo).notes[0]
    other = ldm.write_single_file(tmp_path / "turbomachine.safetensors", "sd1")
    assert model_files.inspect(other).notes == ()


# The VAE's precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vae_stays_in_float32_in_half_precision(single_file_of, dtype):
    """The weights of SDXL's VAE overflow in fp16, which gives black images."""
    base = load_base(config.Base(model=str(single_file_of("sdxl"))), dtype)
    assert base.pipe.unet.dtype == base.pipe.text_encoder_2.dtype == dtype
    image = generate(
        base,
        prompt="a",
        negative_prompt="",
        seed=1,
        inference_steps=1,
        guidance_scale=2.0,
        width=16,
        height=16,
    )
    assert image.size == (16, 16)
    assert {parameter.dtype for parameter in base.pipe.vae.parameters()} == {torch.float32}
