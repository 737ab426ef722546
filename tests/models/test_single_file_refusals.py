"""Single files that are not a whole, trainable Stable Diffusion are refused with a description."""

import pytest
import torch
from safetensors.torch import save_file

from tests import ldm
from trainer import config
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.models import model_files
from trainer.models.single_file import kinds

SD1, SDXL = ldm.whole(ldm.TINY["sd1"]), ldm.whole(ldm.TINY["sdxl"])


def only(prefix, shapes=SD1, remove=""):
    """Returns the tensors below a prefix, with `remove` removed from the front of their names."""
    return {
        name.removeprefix(remove): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }


def without(text, shapes=SD1):
    """Returns the tensors whose names do not contain the text."""
    return {name: shape for name, shape in shapes.items() if text not in name}


FIRST_CONVOLUTION = ldm.UNET + "input_blocks.0.0.weight"
REFUSED = {
    "a_lora": (
        {"lora_unet_mid.lora_up.weight": (4, 2), "lora_unet_mid.lora_down.weight": (2, 4)},
        r"is an adapter \(LoRA\)",
    ),
    "a_vae": (only(ldm.VAE), "is a VAE, not"),
    "a_bare_vae": (only(ldm.VAE, remove=ldm.VAE), "is a VAE, not"),
    "a_text_encoder": (only(ldm.SD1, remove=ldm.SD1), "is a text encoder, not"),
    "a_bare_unet": (only(ldm.UNET, remove=ldm.UNET), "is a UNet alone, not"),
    "unet_only": (only(ldm.UNET), "a UNet without a text encoder and a VAE"),
    "no_vae": (only(ldm.UNET) | only(ldm.SD1), "a UNet without a VAE"),
    "no_unet": (only(ldm.VAE) | only(ldm.SD1), "is a VAE, not"),
    "ema_only": ({"model_ema.diffusion_modeltime_embed0weight": (4, 4)}, "EMA weights only"),
    "a_controlnet": ({"control_model.input_blocks.0.0.weight": (4, 4)}, "is a ControlNet"),
    "flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)}, "is Flux"),
    "an_embedding": ({"emb_params": (2, 32)}, "is a textual inversion"),
    "something": ({"weight": (4, 4)}, "is a file of 1 tensors"),
    "inpainting": ({FIRST_CONVOLUTION: (32, 9, 3, 3)}, r"inpainting model \(9 input channels\)"),
    "instruct_pix2pix": ({FIRST_CONVOLUTION: (32, 8, 3, 3)}, r"editing model \(8 input channels\)"),
    "refiner": (
        only(ldm.UNET, SDXL) | {kinds.REFINER_CLIP + "ln_final.weight": (8,)},
        "is the refiner",
    ),
    "edm": (SDXL | {"edm_vpred.sigma_max": (1,)}, "trained with EDM"),
    "pruned": (without("middle_block.1.", SDXL), "pruned or incomplete UNet"),
    "no_blocks": (without(".in_layers."), "lacks tensors that every"),
    "flat_conv_in": (SD1 | {FIRST_CONVOLUTION: (4,)}, "is not a convolution"),
    "one_tensor_less": (
        without("decoder.mid.block_2.conv1.bias"),
        "do not fit together .tensors are missing",
    ),
    "sd3_without_clip": (
        without("text_encoders.", ldm.whole(ldm.TINY["sd3"])),
        "without CLIP-L and CLIP-G; download the edition with incl_clips in its name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_a_whole_model_is_described(case, tmp_path):
    shapes, words = REFUSED[case]
    path = tmp_path / f"{case}.safetensors"
    save_file(ldm.filled(shapes), path)
    with pytest.raises(ModelError, match=words) as error:
        load_base(config.Base(model=str(path)), torch.float32)
    assert case in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("number", ["64", "5000000", "9" * 300])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_an_absurd_block_number_is_refused_before_it_becomes_a_size(tmp_path, part, number):
    shapes = dict(SD1)
    if part == "unet":
        # The number of the only downsampler determines the layers per level.
        shapes = without(".0.op.")
        shapes[f"{ldm.UNET}input_blocks.{number}.0.op.weight"] = (1,)
        shapes[f"{ldm.UNET}input_blocks.{int(number) + 1}.0.in_layers.2.weight"] = (1,)
    elif part == "vae":
        shapes[f"{ldm.VAE}encoder.down.{number}.x"] = (1,)
    else:
        shapes[f"{ldm.SD1}text_model.encoder.layers.{number}.x"] = (1,)
    path = tmp_path / "x.safetensors"
    save_file(ldm.filled(shapes), path)
    with pytest.raises(ModelError, match="x.safetensors lacks tensors"):
        model_files.inspect(path)


@pytest.mark.parametrize(
    "dtype, words",
    [(torch.float8_e4m3fn, "stored in F8_E4M3"), (torch.int8, "stored in I8")],
    ids=["eight_bit_floats", "whole_numbers"],
)
def test_a_unet_in_too_few_bits_is_refused(tmp_path, dtype, words):
    tensors = {
        name: tensor.to(dtype) if name.startswith(ldm.UNET) else tensor
        for name, tensor in ldm.filled(SD1).items()
    }
    save_file(tensors, tmp_path / "small.safetensors")
    with pytest.raises(ModelError, match=words):
        model_files.inspect(tmp_path / "small.safetensors")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    broken = {ldm.UNET + "out.2.bias": torch.full((4,), float("nan"))}
    path = ldm.write_single_file(tmp_path / "nan.safetensors", "sd1", **broken)
    with pytest.raises(ModelError, match="not finite"):
        load_base(config.Base(model=str(path)), torch.float32)


@pytest.mark.parametrize("suffix", kinds.PICKLES)
def test_a_pickle_is_never_opened(tmp_path, suffix):
    """The file would write PWNED when unpickled."""

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
