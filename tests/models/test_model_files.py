"""Hostile and broken model folders are refused with a message before anything is loaded."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import config
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.models import model_files
from trainer.models.safetensors_header import read_header


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(path, *names):
    tensors = load_file(path)
    for name in names or list(tensors)[:1]:
        tensors.pop(name)
    save_file(tensors or {"foreign": torch.zeros(1)}, path)


UNET = "unet/diffusion_pytorch_model.safetensors"
CASES = {
    "dir_no_unet_weights": (lambda d: (d / UNET).unlink(), "weights unet/.* missing"),
    "dir_no_index": (lambda d: (d / "model_index.json").unlink(), "model_index.json is missing"),
    "dir_bad_json": (lambda d: (d / "model_index.json").write_text("{"), "not valid JSON"),
    "dir_list_json": (lambda d: (d / "model_index.json").write_text("[]"), "not a table"),
    "dir_os_system": (
        lambda d: edit_json(d / "model_index.json", unet=["os", "system"]),
        "names .* as unet",
    ),
    "dir_subprocess": (
        lambda d: edit_json(d / "model_index.json", unet=["subprocess", "Popen"]),
        "names .* as unet",
    ),
    "dir_evil_mod": (
        lambda d: edit_json(d / "model_index.json", vae=["evil", "Vae"]),
        "names .* as vae",
    ),
    "dir_no_names": (
        lambda d: edit_json(d / "model_index.json", unet=[{}, "b"]),
        "names .* as unet",
    ),
    "dir_custom_pipe": (
        lambda d: edit_json(d / "model_index.json", _class_name="pipeline"),
        "is a pipeline",
    ),
    "dir_relclass": (
        lambda d: edit_json(d / "model_index.json", unet=["diffusers", "..UNet2DConditionModel"]),
        "names .* as unet",
    ),
    "dir_other_pipe": (
        lambda d: edit_json(d / "model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline",
    ),
    "dir_named_as_xl": (
        lambda d: edit_json(d / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "names None as text_encoder_2",
    ),
    "dir_second_encoder": (
        lambda d: edit_json(
            d / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]
        ),
        "names text_encoder_2, a part",
    ),
    "dir_vae_shifts": (
        lambda d: edit_json(d / "vae/config.json", latents_mean=[0.1] * 4),
        "shifts its latents",
    ),
    "dir_extra_part": (
        lambda d: edit_json(d / "model_index.json", helper=["os", "system"]),
        "part that no StableDiffusionPipeline has",
    ),
    "dir_auto_map_te": (
        lambda d: edit_json(d / "text_encoder/config.json", auto_map={"AutoModel": "x.Y"}),
        "run its own code",
    ),
    "dir_attn_internal": (
        lambda d: edit_json(d / "text_encoder/config.json", _attn_implementation_internal="a/b"),
        "run its own code",
    ),
    "dir_auto_map_tok": (
        lambda d: edit_json(
            d / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"}
        ),
        "run its own code",
    ),
    "dir_auto_map_unet": (
        lambda d: edit_json(d / "unet/config.json", auto_map={"AutoModel": "x.Y"}),
        "run its own code",
    ),
    "dir_cfg_mismatch": (
        lambda d: edit_json(d / "unet/config.json", block_out_channels=[32, 64]),
        "do not fit together",
    ),
    "dir_nan_unet": (
        lambda d: save_file(
            {n: torch.full_like(t, float("nan")) for n, t in load_file(d / UNET).items()}, d / UNET
        ),
        "not finite",
    ),
    "dir_unet_missing_key": (lambda d: drop_tensor(d / UNET), "lacks 1 of"),
    "dir_unet_foreign": (lambda d: save_file({"foreign": torch.zeros(1)}, d / UNET), "lacks"),
    "dir_te_missing_key": (
        lambda d: drop_tensor(d / "text_encoder/model.safetensors"),
        "lacks 1 of",
    ),
    "dir_vae_missing_key": (
        lambda d: drop_tensor(d / "vae/diffusion_pytorch_model.safetensors"),
        "lacks 1 of",
    ),
    "dir_tok_no_vocab": (
        lambda d: [path.unlink() for path in (d / "tokenizer").iterdir()],
        "no vocabulary",
    ),
    "dir_tok_trunc": (
        lambda d: (d / "tokenizer/tokenizer.json").write_text('{"version": "1.0", "trunc'),
        "not valid JSON",
    ),
    "dir_pickle": (lambda d: (d / UNET).rename(d / "unet/diffusion_pytorch_model.bin"), "pickle"),
    "dir_inpaint": (lambda d: edit_json(d / "unet/config.json", in_channels=9), "9 input channels"),
    "dir_empty": (lambda d: shutil.rmtree(d) or d.mkdir(), "model_index.json is missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_model_folder_is_refused_and_runs_nothing(case, tiny_base, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("open('PWNED', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    spoil, words = CASES[case]
    spoil(folder)
    with pytest.raises(ModelError, match=words) as error:
        load_base(config.Base(model=str(folder)), torch.float32)
    assert str(error.value).endswith(".")
    assert not (tmp_path / "PWNED").exists()


def test_unknown_config_keys_and_a_hostile_template_are_harmless(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    edit_json(folder / "unet/config.json", colour="red")
    edit_json(folder / "tokenizer/tokenizer_config.json", chat_template="{{ ''.__class__ }}")
    load_base(config.Base(model=str(folder)), torch.float32)


def test_a_folder_with_fp16_weights_only_is_loaded(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert model_files.inspect(folder).variant == "fp16"
    load_base(config.Base(model=str(folder)), torch.float32)


def test_files_are_listed_as_diffusers_loads_them_if_some_parts_have_no_fp16_edition(
    tiny_base, tmp_path
):
    """Diffusers loads the fp16 edition of every part that has one."""
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    (folder / UNET).rename((folder / UNET).with_suffix(".fp16.safetensors"))
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    doubled = {name: 2 * tensor for name, tensor in load_file(vae).items()}
    save_file(doubled, vae.with_suffix(".fp16.safetensors"))
    base = load_base(config.Base(model=str(folder)), torch.float32)
    is_fp16 = {part: ".fp16." in paths[0].name for part, paths in base.files.weights.items()}
    assert is_fp16 == {"unet": True, "vae": True, "text_encoder": False}
    assert torch.equal(base.pipe.vae.quant_conv.weight, doubled["quant_conv.weight"])


def test_the_full_precision_edition_is_listed_if_both_are_there(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    for path in folder.glob("*/*.safetensors"):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    inspected = model_files.inspect(folder)
    assert inspected.variant is None
    files = [path.name for paths in inspected.weights.values() for path in paths]
    assert not [name for name in files if ".fp16." in name]
    assert set(inspected.weights) == set(inspected.tensors)


def test_a_model_that_is_not_downloaded_is_refused_offline():
    base = config.Base(model="someone/not-downloaded")
    assert model_files.locate(base) is None
    words = "not on this machine and could not be downloaded .HF_HUB_OFFLINE is set"
    with pytest.raises(ModelError, match=words):
        load_base(base, torch.float32)


def test_a_downloaded_model_is_loaded_offline(tiny_base, tmp_path, monkeypatch):
    """The cache is filled by hand in the layout of the hub client."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--model" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_base, snapshot)
    (cache / "models--someone--model" / "refs").mkdir()
    (cache / "models--someone--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(
        model_files,
        "try_to_load_from_cache",
        lambda model, name, revision: str(snapshot / name) if (snapshot / name).exists() else None,
    )
    base = load_base(config.Base(model="someone/model"), torch.float32)
    assert base.files.path == snapshot


def raw(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def described(**tensors) -> bytes:
    return json.dumps(
        {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in tensors.items()}
    ).encode()


FILES = {
    "st_empty": b"",
    "st_7": b"1234567",
    "st_len_huge": struct.pack("<Q", 2**63 - 1) + b"{}",
    "st_len_max": struct.pack("<Q", 2**64 - 1) + b"{}",
    "st_len_over": struct.pack("<Q", 1000) + b"{}",
    "st_overlap": raw(described(a=("F32", [2], [0, 8]), b=("F32", [1], [4, 8])), b"0" * 8),
    "st_gap": raw(described(a=("F32", [1], [0, 4]), b=("F32", [1], [8, 12])), b"0" * 12),
    "st_shape": raw(described(a=("F32", [3], [0, 8])), b"0" * 8),
    "st_neg": raw(described(a=("F32", [-2], [0, 8])), b"0" * 8),
    "st_overflow": raw(described(a=("F32", [2**40, 2**40], [0, 8])), b"0" * 8),
    "st_off_rev": raw(described(a=("F32", [2], [8, 0])), b"0" * 8),
    "st_dup": raw(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"0",
    ),
    "st_dtype": raw(described(a=("F99", [2], [0, 8])), b"0" * 8),
    "st_dtype_list": raw(described(a=([], [2], [0, 8])), b"0" * 8),
    "st_dimensions": raw(described(a=("F32", [1] * 9, [0, 4])), b"0" * 4),
    "st_nojson": raw(b"[1,2,3]"),
    "st_nested": raw(b"[" * 200_000),
    "st_meta_big": raw(b'{"__metadata__":{"a":"' + b"x" * (17 * 2**20) + b'"}}'),
    "st_many": raw(
        json.dumps(
            {
                str(i): {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
                for i in range(30_000)
            }
        ).encode(),
        b"0" * 30_000,
    ),
    "st_zero_elems": raw(described(a=("F32", [0, 2**40], [0, 0]))),
    "st_path_key": raw(
        json.dumps({"../../x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode(),
        b"0",
    ),
    "st_cut": raw(described(a=("F32", [2], [0, 8])), b"0" * 5),
    "gguf": b"GGUF" + b"\0" * 100,
    "html_named_st": b"<!DOCTYPE html><html>login</html>",
    "pkl_as_st": b"\x80\x04\x95" + b"x" * 50,
    "pkl_zip_as_st": b"PK\x03\x04" + b"x" * 50,
    "st_bool_shape": raw(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"0"),
    "st_meta_list": raw(b'{"__metadata__":[1]}'),
    "st_null": raw(b'{"a":null}'),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_safetensors_file_is_refused(case, tmp_path):
    path = tmp_path / f"{case}.safetensors"
    path.write_bytes(FILES[case])
    with pytest.raises(ModelError, match=f"{case}.safetensors is not a usable"):
        read_header(path)
    for base in (config.Base(model=str(path)), config.Base(vae=str(path))):
        with pytest.raises(ModelError, match=f"{case}.safetensors is not a usable"):
            load_base(base, torch.float32)
    if case in ("html_named_st", "gguf", "pkl_as_st"):
        with pytest.raises(ModelError, match="web page|GGUF|pickle"):
            read_header(path)


def test_a_header_gives_the_shapes_of_all_tensors(tiny_base):
    header = read_header(tiny_base / UNET)
    loaded = load_file(tiny_base / UNET)
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(t.shape) for name, t in loaded.items()
    }
