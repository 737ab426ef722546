"""Base models in one .safetensors file: told by their header, loaded with sockets blocked, trained; what is something else is refused."""

import json
import re
import shutil
import socket

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests import ldm
from trainer import config
from trainer.cli.describe import describe
from trainer.errors import ConfigError, ModelError
from trainer.families import FAMILIES, from_single_file, load_base
from trainer.inference.samples import generate
from trainer.models import model_files
from trainer.models import single_file
from trainer.models.safetensors_header import TensorInfo
from trainer.runs import events, run_folder, run_status
from trainer.training import estimate, setup

MARKER = torch.tensor([])  # how v_pred and ztsnr stand in a file: a name without numbers


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Kind -> its tiny checkpoint, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = ldm.write_checkpoint(
                tmp_path_factory.mktemp("ldm") / f"{kind}.safetensors", kind
            )
        return made[kind]

    return get


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd35m"])
def test_training_from_a_single_file_needs_no_network(checkpoint_of, train_tiny, no_network, kind):
    folder = train_tiny(
        {
            "base.model": str(checkpoint_of(kind)),
            "training.text_encoder_learning_rate": 1e-2,
            "training.steps": 2,
            "saving.saves": 1,
        }
    )
    status = run_status.read_status(folder)
    assert [s.step for s in status.samples] == [0, 2] and not status.warnings
    keys = {
        name.partition(".")[0] if kind == "sd35m" else name.split("_")[1]
        for name in load_file(folder / status.finished.file)
    }
    assert (
        keys
        == {
            "sd1": {"unet", "te"},
            "sdxl": {"unet", "te1", "te2"},
            "sd35m": {"transformer", "text_encoder", "text_encoder_2"},
        }[kind]
    )
    assert status.started.trainable_parameters == estimate.trainable_parameters(
        config.load(folder / "run.toml")
    )


@pytest.mark.parametrize("kind, family", [("sd1", "sd1"), ("sd2", "sd2"), ("sdxl", "sdxl")])
def test_every_tensor_arrives_where_diffusers_has_it(checkpoint_of, kind, family):
    files = model_files.inspect(checkpoint_of(kind))
    base = load_base(
        config.Base(model=str(files.path), prediction="v" if kind == "sd2" else "auto"),
        torch.float32,
    )
    assert base.family is FAMILIES[family]
    for part in files.tensors:
        state = {
            name.removeprefix("text_model."): tuple(tensor.shape)
            for name, tensor in getattr(base.pipe, part).state_dict().items()
        }
        told = {
            name.removeprefix("text_model."): info.shape
            for name, info in files.tensors[part].items()
        }
        if part == "vae":
            assert sorted(map(sorted, state.values())) != [] and len(state) == len(told)
        else:
            assert state == {
                name: shape
                for name, shape in told.items()
                if not (kind == "sd2" and name == "text_projection.weight")
            }
    stored = load_file(files.path)
    assert torch.equal(
        base.pipe.unet.mid_block.resnets[0].conv1.weight,
        stored[ldm.UNET + "middle_block.0.in_layers.2.weight"].float(),
    )
    if kind != "sd1":
        fused = stored[
            (ldm.SD2 if kind == "sd2" else ldm.XL_2) + "transformer.resblocks.1.attn.in_proj_weight"
        ].float()
        encoder = list(base.family.text_encoders(base.pipe).values())[-1]
        layer = dict(encoder.named_modules())[
            f"{'text_model.' if kind == 'sdxl' else ''}encoder.layers.1.self_attn"
        ]
        assert torch.equal(
            torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]), fused
        )
    assert base.pipe.vae.dtype == torch.float32
    if kind == "sdxl":
        assert (base.pipe.tokenizer.pad_token, base.pipe.tokenizer_2.pad_token) == (
            "<|endoftext|>",
            "!",
        )


@pytest.mark.parametrize("template", ldm.FULL)
def test_the_shapes_of_the_full_models_give_their_public_configurations(template, tmp_path):
    """Derived from the tensors of SD 1.5, 2.1 and XL as their makers named them; and diffusers, so configured, has just those tensors."""
    parts = {
        prefix: {name: TensorInfo("F16", shape) for name, shape in shapes.items()}
        for prefix, shapes in ldm.FULL[template].items()
    }
    unet = checkpoint.unet_config(
        parts.pop(ldm.UNET), checkpoint.template_config(template, "unet/config.json")
    )
    vae = checkpoint.vae_config(
        parts.pop(ldm.VAE), checkpoint.template_config(template, "vae/config.json")
    )
    assert unet == checkpoint.template_config(template, "unet/config.json")
    assert vae == checkpoint.template_config(template, "vae/config.json")
    with torch.device("meta"):
        state = UNet2DConditionModel.from_config(unet).state_dict()
        assert len(AutoencoderKL.from_config(vae).state_dict()) == len(ldm.FULL_VAE)
    shapes = ldm.FULL[template][ldm.UNET]
    assert {checkpoint.unet_name(name, 2): shape for name, shape in shapes.items()} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    for part, tensors in zip(("text_encoder", "text_encoder_2"), parts.values(), strict=False):
        public = checkpoint.template_config(template, f"{part}/config.json")
        named = checkpoint.text_encoder_tensors(tensors)
        derived = checkpoint.text_config(named, public)
        assert derived | {"projection_dim": 0} == public | {"projection_dim": 0}
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(derived))
        with torch.device("meta"):
            encoder = (CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel)(
                AutoConfig.from_pretrained(tmp_path / part)
            )
        own = {
            name.removeprefix("text_model."): tuple(tensor.shape)
            for name, tensor in encoder.state_dict().items()
        }
        told = {
            name.removeprefix("text_model."): info.shape
            for name, info in named.items()
            if ".layers.23." not in name or template != "sd21"
        }
        assert own == {name: shape for name, shape in told.items() if name in own} and len(
            told
        ) - len(own) == (template == "sd21")


@pytest.mark.parametrize("kind, family", [("sd3", "sd3m"), ("sd35m", "sd35m"), ("sd35l", "sd35l")])
def test_the_three_stable_diffusion_3_are_told_apart(checkpoint_of, kind, family):
    base = load_base(config.Base(model=str(checkpoint_of(kind))), torch.float32)
    assert base.family is FAMILIES[family] and base.pipe.text_encoder_3 is None
    own = {
        n: tuple(t.shape)
        for n, t in base.pipe.transformer.state_dict().items()
        if re.search(r"\.attn2?\.(to|add)_", n)
    }
    told = {
        n: info.shape
        for n, info in base.files.tensors["transformer"].items()
        if re.search(r"\.attn2?\.(to|add)_", n)
    }
    assert own == told and len(own) == 2 * (8 + 7 + 4 * (kind == "sd35m"))
    stored = load_file(base.files.path)[
        ldm.UNET + "joint_blocks.1.context_block.attn.qkv.weight"
    ].float()
    attention = base.pipe.transformer.transformer_blocks[1].attn
    assert torch.equal(
        torch.cat(
            [attention.add_q_proj.weight, attention.add_k_proj.weight, attention.add_v_proj.weight]
        ),
        stored,
    )
    assert (base.pipe.tokenizer.pad_token, base.pipe.tokenizer_2.pad_token) == (
        "<|endoftext|>",
        "!",
    )


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
def test_the_shapes_of_stable_diffusion_3_give_its_public_configurations(template):
    tensors = {
        name: TensorInfo("F16", shape) for name, shape in ldm.mmdit(**FULL_SD3[template]).items()
    }
    public = checkpoint.template_config(template, "transformer/config.json")
    assert checkpoint.transformer_config(tensors, public) == public


def test_a_stable_diffusion_3_without_its_text_encoders_is_refused_and_t5_is_left_out(tmp_path):
    with pytest.raises(
        ModelError, match="without CLIP-L and CLIP-G; get the edition whose name says incl_clips"
    ):
        inspected(tmp_path, "sd3", without="text_encoders.")
    files = inspected(tmp_path, "sd3", **{checkpoint.SD3_T5 + "shared.weight": torch.ones(2, 2)})
    assert "captions are read with CLIP alone" in files.notes[0] and files.left_out == [
        "text_encoder_3",
        "tokenizer_3",
    ]


def test_the_tokenizer_is_clips():
    tokenizer = from_single_file.clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    words = tokenizer("A  Zürich, 1999!").input_ids
    assert tokenizer.decode(words, skip_special_tokens=True) == "a zürich , 1 9 9 9 !" and words[
        -3:-1
    ] == [280, 256]
    assert (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.model_max_length,
    ) == (49406, 49407, 49407, 77)
    assert from_single_file.clip_tokenizer("!").pad_token_id == 0


# --- What a file says of its prediction ----------------------------------------------------------------------------------------


def inspected(tmp_path, kind, **how):
    return model_files.inspect(ldm.write_checkpoint(tmp_path / "model.safetensors", kind, **how))


@pytest.mark.parametrize(
    "kind, how, prediction, zero_snr",
    [
        ("sd1", {}, "epsilon", None),
        ("sd1", {"metadata": {"modelspec.prediction_type": "v"}}, "v_prediction", None),
        ("sdxl", {"v_pred": MARKER}, "v_prediction", None),
        ("sdxl", {"v_pred": MARKER, "ztsnr": MARKER}, "v_prediction", True),
        ("sd2", {}, None, None),
        (
            "sd2",
            {"metadata": {"modelspec.architecture": "stable-diffusion-v2-768-v"}},
            "v_prediction",
            None,
        ),
        (
            "sd2",
            {"metadata": {"modelspec.architecture": "stable-diffusion-v2-512"}},
            "epsilon",
            None,
        ),
        ("sd2", {checkpoint.SD2_PROBE: torch.tensor([0.2, -0.2, 0.1, -0.1])}, "v_prediction", None),
        ("sd2", {checkpoint.SD2_PROBE: torch.tensor([0.02, -0.02, 0.01, -0.01])}, "epsilon", None),
    ],
)
def test_the_prediction_is_told_by_the_file(tmp_path, kind, how, prediction, zero_snr):
    scheduler = inspected(tmp_path, kind, **how).configs["scheduler"]
    assert (scheduler["prediction_type"], scheduler.get("rescale_betas_zero_snr")) == (
        prediction,
        zero_snr,
    )


def test_v_prediction_with_zero_terminal_snr_reaches_training_and_samples(tmp_path):
    path = ldm.write_checkpoint(tmp_path / "noob.safetensors", "sdxl", v_pred=MARKER, ztsnr=MARKER)
    base = load_base(config.Base(model=str(path)), torch.float32)
    objective = base.family.objective(base.pipe)
    assert (
        objective.prediction_type == "v_prediction" and float(objective.alphas_cumprod[-1]) < 1e-7
    )
    assert base.pipe.scheduler.config.timestep_spacing == "trailing"
    plain = load_base(
        config.Base(model=str(path), prediction="epsilon", zero_terminal_snr="off"), torch.float32
    )
    objective = plain.family.objective(plain.pipe)
    assert objective.prediction_type == "epsilon" and float(objective.alphas_cumprod[-1]) > 1e-3
    with pytest.raises(ModelError, match="predicts epsilon, which zero terminal SNR rules out"):
        load_base(config.Base(model=str(path), prediction="epsilon"), torch.float32)
    with pytest.raises(ConfigError, match="needs v prediction"):
        config.replace(
            config.RunConfig(), {"base.prediction": "epsilon", "base.zero_terminal_snr": "on"}
        )


def test_the_page_counts_and_chooses_recipes_for_a_single_file(checkpoint_of, tiny_run):
    """By the header alone, before anything is loaded."""
    from app.tabs.train import SD15, SDXL, _kind_of

    assert (_kind_of(str(checkpoint_of("sd1"))), _kind_of(str(checkpoint_of("sdxl")))) == (
        SD15,
        SDXL,
    )
    run = tiny_run(
        {
            "base.model": str(checkpoint_of("sdxl")),
            "adapter.rank": 1,
            "training.text_encoder_learning_rate": 1e-4,
        }
    )
    projections = [
        shape
        for name, shape in ldm.whole(ldm.TINY["sdxl"]).items()
        if re.search(
            r"(attn\d\.to_(q|k|v|out\.0)|self_attn\.\w+_proj|attn\.out_proj)\.weight", name
        )
    ]
    fused = 2 * 3 * (48 + 48)  # query, key and value of the two layers of OpenCLIP
    assert estimate.trainable_parameters(run) == sum(map(sum, projections)) + fused


def test_settings_say_what_no_file_does(checkpoint_of, tiny_base):
    with pytest.raises(ModelError, match="Nothing in sd2.safetensors tells whether"):
        load_base(config.Base(model=str(checkpoint_of("sd2"))), torch.float32)
    base = load_base(
        config.Base(model=str(tiny_base), prediction="v", zero_terminal_snr="on"), torch.float32
    )
    objective = base.family.objective(base.pipe)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    rescaled = (
        (root - root[-1]) * root[0] / (root[0] - root[-1])
    ) ** 2  # Lin et al. 2024, algorithm 1
    torch.testing.assert_close(objective.alphas_cumprod.double(), rescaled, rtol=1e-4, atol=1e-6)
    assert (
        objective.prediction_type == "v_prediction"
        and base.pipe.scheduler.config.timestep_spacing == "trailing"
    )


# --- What else a file may be ----------------------------------------------------------------------------------------------------


def only(prefix, kind="sd1", cut=""):
    return {
        name.removeprefix(cut): shape
        for name, shape in ldm.whole(ldm.TINY[kind]).items()
        if name.startswith(prefix)
    }


OTHER = {
    "a_lora": (
        {"lora_unet_mid.lora_up.weight": (4, 2), "lora_unet_mid.lora_down.weight": (2, 4)},
        r"is an adapter \(LoRA\)",
    ),
    "a_vae": (only(ldm.VAE), "is a VAE, not"),
    "a_bare_vae": (only(ldm.VAE, cut=ldm.VAE), "is a VAE, not"),
    "a_text_encoder": (only(ldm.SD1, cut=ldm.SD1), "is a text encoder, not"),
    "a_bare_unet": (only(ldm.UNET, cut=ldm.UNET), "is a UNet alone, not"),
    "unet_only": (only(ldm.UNET), "a UNet without a text encoder and a VAE"),
    "no_vae": (only(ldm.UNET) | only(ldm.SD1), "a UNet without a VAE"),
    "no_unet": (only(ldm.VAE) | only(ldm.SD1), "is a VAE, not"),
    "ema_only": ({"model_ema.diffusion_modeltime_embed0weight": (4, 4)}, "EMA weights only"),
    "a_controlnet": ({"control_model.input_blocks.0.0.weight": (4, 4)}, "is a ControlNet"),
    "flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)}, "is Flux"),
    "an_embedding": ({"emb_params": (2, 32)}, "is a textual inversion"),
    "something": ({"weight": (4, 4)}, "is a file of 1 tensors"),
    "inpainting": (
        {ldm.UNET + "input_blocks.0.0.weight": (32, 9, 3, 3)},
        r"inpainting model \(9 input channels\)",
    ),
    "instruct_pix2pix": (
        {ldm.UNET + "input_blocks.0.0.weight": (32, 8, 3, 3)},
        r"editing model \(8 input channels\)",
    ),
    "refiner": (
        only(ldm.UNET, "sdxl") | {checkpoint.REFINER_CLIP + "ln_final.weight": (8,)},
        "is the refiner",
    ),
    "edm": (ldm.whole(ldm.TINY["sdxl"]) | {"edm_vpred.sigma_max": (1,)}, "trained with EDM"),
    "pruned": (
        {n: s for n, s in ldm.whole(ldm.TINY["sdxl"]).items() if "middle_block.1." not in n},
        "pruned or incomplete UNet",
    ),
    "no_blocks": (
        {n: s for n, s in ldm.whole(ldm.TINY["sd1"]).items() if ".in_layers." not in n},
        "lacks tensors that every",
    ),
    "flat_conv_in": (
        ldm.whole(ldm.TINY["sd1"]) | {ldm.UNET + "input_blocks.0.0.weight": (4,)},
        "is no convolution",
    ),
    "one_tensor_less": (
        {
            n: s
            for n, s in ldm.whole(ldm.TINY["sd1"]).items()
            if not n.endswith("block_2.conv1.bias")
        },
        "does not fit together .tensors are missing",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_is_no_whole_model_is_named(case, tmp_path):
    shapes, words = OTHER[case]
    path = tmp_path / f"{case}.safetensors"
    save_file(ldm.filled(shapes), path)
    with pytest.raises(ModelError, match=words) as error:
        load_base(config.Base(model=str(path)), torch.float32)
    assert case in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("number", ["64", "5000000", "9" * 300])
@pytest.mark.parametrize(
    "block, after",
    [
        (
            ldm.UNET + "input_blocks.{}.0.op.weight",
            ldm.UNET + "input_blocks.{}.0.in_layers.2.weight",
        ),
        (ldm.VAE + "encoder.down.{}.x", ""),
        (ldm.SD1 + "text_model.encoder.layers.{}.x", ""),
    ],
    ids=["unet", "vae", "text_encoder"],
)
def test_a_block_with_an_absurd_number_is_refused_before_it_is_a_size(
    tmp_path, number, block, after
):
    """A single downsampler says how many layers a level has, so the others are taken out."""
    shapes = {
        name: shape
        for name, shape in ldm.whole(ldm.TINY["sd1"]).items()
        if not (after and ".0.op." in name)
    }
    path = tmp_path / "x.safetensors"
    save_file(
        ldm.filled(
            shapes
            | {block.format(number): (1,)}
            | ({after.format(int(number) + 1): (1,)} if after else {})
        ),
        path,
    )
    with pytest.raises(ModelError, match="x.safetensors lacks tensors"):
        model_files.inspect(path)


@pytest.mark.parametrize(
    "dtype, words",
    [(torch.float8_e4m3fn, "stored in F8_E4M3"), (torch.int8, "stored in I8")],
    ids=["eight_bit_floats", "whole_numbers"],
)
def test_a_unet_in_too_coarse_numbers_is_refused(tmp_path, dtype, words):
    tensors = ldm.filled(ldm.whole(ldm.TINY["sd1"]))
    save_file(
        {n: t.to(dtype) if n.startswith(ldm.UNET) else t for n, t in tensors.items()},
        tmp_path / "small.safetensors",
    )
    with pytest.raises(ModelError, match=words):
        model_files.inspect(tmp_path / "small.safetensors")


def test_numbers_that_are_none_are_found(tmp_path):
    path = ldm.write_checkpoint(
        tmp_path / "nan.safetensors",
        "sd1",
        **{ldm.UNET + "out.2.bias": torch.full((4,), float("nan"))},
    )
    with pytest.raises(ModelError, match="not finite"):
        load_base(config.Base(model=str(path)), torch.float32)


@pytest.mark.parametrize("suffix", checkpoint.PICKLES)
def test_a_pickle_is_never_opened(tmp_path, suffix):
    """torch.save of an object that leaves a file behind when it is unpickled."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "PWNED"), "w"))

    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": Payload()}, path)
    for base in (config.Base(model=str(path)), config.Base(vae=str(path))):
        with pytest.raises(ModelError, match="pickle file.*convert it to .safetensors first"):
            load_base(base, torch.float32)
    path.rename(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="pickle file"):
        load_base(config.Base(model=str(tmp_path / "model.safetensors")), torch.float32)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "kind, how, told",
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
        (
            "sd2",
            {},
            {
                "family": "Stable Diffusion 2.x",
                "prediction": "not told by the file: set base.prediction",
            },
        ),
        (
            "sdxl",
            {"v_pred": MARKER, "ztsnr": MARKER},
            {"family": "Stable Diffusion XL", "prediction": "v", "zero terminal SNR": "yes"},
        ),
    ],
)
def test_info_tells_what_a_base_is(tmp_path, kind, how, told):
    facts = describe(ldm.write_checkpoint(tmp_path / "model.safetensors", kind, **how))
    assert told.items() <= facts.items() and facts["layout"] == "a single file"
    assert (
        facts["UNet"]
        == f"{sum(torch.Size(shape).numel() for shape in ldm.TINY[kind][ldm.UNET].values()):,} parameters in F16"
    )


def test_info_tells_what_a_folder_is_and_refuses_a_pickle(tiny_base, tmp_path):
    facts = describe(tiny_base)
    sizeless = shutil.copytree(tiny_base, tmp_path / "sizeless")
    settings = json.loads((sizeless / "unet/config.json").read_text())
    settings.pop("sample_size")
    (sizeless / "unet/config.json").write_text(json.dumps(settings))
    assert "made for" in facts and "made for" not in describe(sizeless)
    assert (
        facts["layout"] == "a diffusers folder"
        and facts["family"] == "Stable Diffusion 1.x"
        and facts["prediction"] == "epsilon"
    )
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(ModelError, match="pickle file"):
        describe(tmp_path / "model.ckpt")


# --- Another VAE ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_vae(tmp_path):
    """The VAE of the tiny checkpoints with other weights, in its three layouts."""
    alone = ldm.filled(ldm.TINY["sd1"][ldm.VAE], seed=7)
    save_file(alone, tmp_path / "vae.safetensors")
    save_file(
        {ldm.VAE + name: tensor for name, tensor in alone.items()},
        tmp_path / "prefixed.safetensors",
    )
    source = ldm.write_checkpoint(
        tmp_path / "source.safetensors", "sd1", **load_file(tmp_path / "prefixed.safetensors")
    )
    load_base(config.Base(model=str(source)), torch.float32).pipe.vae.save_pretrained(
        tmp_path / "vae"
    )
    return tmp_path


def test_another_vae_is_used_from_a_file_or_a_folder(checkpoint_of, other_vae, tiny_run):
    weights = load_file(other_vae / "vae.safetensors")["decoder.conv_in.weight"].float()
    hashes = set()
    for name in ("vae.safetensors", "prefixed.safetensors", "vae"):
        base = load_base(
            config.Base(model=str(checkpoint_of("sd1")), vae=str(other_vae / name)), torch.float16
        )
        assert (
            torch.equal(base.pipe.vae.decoder.conv_in.weight, weights)
            and base.pipe.vae.dtype == torch.float32
        )
        hashes.add(setup.base_hashes(base)[0])
    plain = load_base(config.Base(model=str(checkpoint_of("sd1"))), torch.float16)
    assert plain.pipe.unet.dtype == torch.float16 and plain.pipe.vae.dtype == torch.float32
    assert len({*hashes, setup.base_hashes(plain)[0]}) == 4, (
        "latents of one VAE are never taken for another's"
    )


def test_another_vae_of_a_folder_base_reaches_its_latents(tiny_base, tiny_run, tmp_path):
    base = load_base(config.Base(model=str(tiny_base)), torch.float32)
    torch.nn.init.normal_(base.pipe.vae.quant_conv.bias)
    base.pipe.vae.save_pretrained(tmp_path / "vae")
    latents = []
    for vae in ("", str(tmp_path / "vae")):
        run = tiny_run({"base.vae": vae})
        folder = run_folder.create(run)
        latents.append(
            setup.prepare(run, folder, events.EventLog(folder / "events.jsonl")).examples[0].mean
        )
    assert not torch.allclose(*latents)


def edited(folder, **changes):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder / "vae"


VAES = {
    "of_another_family": (lambda d: edited(d, scaling_factor=0.13025), "belongs to another family"),
    "of_another_class": (
        lambda d: edited(d, _class_name="AutoencoderTiny"),
        "must be an AutoencoderKL",
    ),
    "of_more_channels": (
        lambda d: (
            save_file(ldm.filled(ldm.vae(latents=16)), d / "x.safetensors") or d / "x.safetensors"
        ),
        "16 latent channels and that of sd1.safetensors has 4",
    ),
    "of_another_factor": (
        lambda d: (
            save_file(ldm.filled(ldm.vae(multiples=(1, 1, 2))), d / "x.safetensors")
            or d / "x.safetensors"
        ),
        "another factor",
    ),
    "without_widths": (
        lambda d: edited(d, block_out_channels=None),
        "does not say its block_out_channels",
    ),
    "flat": (
        lambda d: (
            save_file(ldm.filled(ldm.vae() | {"decoder.conv_in.weight": (4,)}), d / "x.safetensors")
            or d / "x.safetensors"
        ),
        "no whole VAE",
    ),
    "a_lora": (
        lambda d: (
            save_file({"a.lora_up.weight": torch.ones(2, 2)}, d / "x.safetensors")
            or d / "x.safetensors"
        ),
        "is an adapter",
    ),
    "missing": (lambda d: d / "nowhere.safetensors", "There is no VAE at"),
    "an_empty_folder": (lambda d: (d / "empty").mkdir() or d / "empty", "config.json is missing"),
}


@pytest.mark.parametrize("case", VAES)
def test_a_vae_that_does_not_fit_is_refused(case, checkpoint_of, other_vae):
    make, words = VAES[case]
    with pytest.raises(ModelError, match=words):
        load_base(
            config.Base(model=str(checkpoint_of("sd1")), vae=str(make(other_vae))), torch.float32
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vae_of_sdxl_is_never_in_half_precision(checkpoint_of, dtype):
    """Its weights overflow fp16 to black pictures."""
    base = load_base(config.Base(model=str(checkpoint_of("sdxl"))), dtype)
    assert (
        base.pipe.vae.dtype == torch.float32
        and base.pipe.unet.dtype == dtype == base.pipe.text_encoder_2.dtype
    )
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
    assert image.size == (16, 16) and {module.dtype for module in base.pipe.vae.parameters()} == {
        torch.float32
    }


def test_a_distilled_model_is_said(tmp_path):
    path = ldm.write_checkpoint(tmp_path / "dreamshaperXL_turbo.safetensors", "sd1")
    assert "calls itself turbo" in model_files.inspect(path).notes[0]
    path = ldm.write_checkpoint(tmp_path / "turbomachine.safetensors", "sd1")
    assert model_files.inspect(path).notes == ()
