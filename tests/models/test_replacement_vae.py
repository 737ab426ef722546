"""The VAE that `base.vae` names replaces the VAE of the base."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import ldm
from trainer import config
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.runs import events, run_folder
from trainer.training import setup


@pytest.fixture
def other_vae(tmp_path):
    """Writes the VAE of the tiny single files with other weights in three layouts.

    Returns a folder with vae.safetensors, prefixed.safetensors and the diffusers folder vae.
    """
    alone = ldm.filled(ldm.TINY["sd1"][ldm.VAE], seed=7)
    prefixed = {ldm.VAE + name: tensor for name, tensor in alone.items()}
    save_file(alone, tmp_path / "vae.safetensors")
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    source = ldm.write_single_file(tmp_path / "source.safetensors", "sd1", **prefixed)
    base = load_base(config.Base(model=str(source)), torch.float32)
    base.pipe.vae.save_pretrained(tmp_path / "vae")
    return tmp_path


@pytest.mark.parametrize("layout", ["vae.safetensors", "prefixed.safetensors", "vae"])
def test_a_vae_is_loaded_from_a_file_or_a_folder(single_file_of, other_vae, layout):
    weights = load_file(other_vae / "vae.safetensors")["decoder.conv_in.weight"].float()
    model = str(single_file_of("sd1"))
    base = load_base(config.Base(model=model, vae=str(other_vae / layout)), torch.float16)
    assert torch.equal(base.pipe.vae.decoder.conv_in.weight, weights)
    assert base.pipe.vae.dtype == torch.float32
    assert base.pipe.unet.dtype == torch.float16


def test_each_vae_has_its_own_latent_cache(single_file_of, other_vae):
    model = str(single_file_of("sd1"))
    vaes = ["", *(str(other_vae / name) for name in ("vae.safetensors", "vae"))]
    bases = [load_base(config.Base(model=model, vae=vae), torch.float16) for vae in vaes]
    assert len({setup.base_hashes(base)[0] for base in bases}) == len(bases)


def test_the_replacement_vae_of_a_folder_encodes_the_images(tiny_base, tiny_run, tmp_path):
    base = load_base(config.Base(model=str(tiny_base)), torch.float32)
    torch.nn.init.normal_(base.pipe.vae.quant_conv.bias)
    base.pipe.vae.save_pretrained(tmp_path / "vae")
    latents = []
    for vae in ("", str(tmp_path / "vae")):
        run = tiny_run({"base.vae": vae})
        folder = run_folder.create(run)
        session = setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))
        latents.append(session.data.examples[0].mean)
    assert not torch.allclose(*latents)


def edited(folder, **changes):
    """Changes the configuration of the VAE in diffusers' layout and returns its folder."""
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder / "vae"


def saved(folder, shapes):
    save_file(ldm.filled(shapes), folder / "x.safetensors")
    return folder / "x.safetensors"


def empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


REFUSED = {
    "of_another_family": (lambda d: edited(d, scaling_factor=0.13025), "belongs to another family"),
    "of_another_class": (lambda d: edited(d, _class_name="AutoencoderTiny"), "an AutoencoderKL"),
    "of_more_channels": (
        lambda d: saved(d, ldm.vae(latents=16)),
        "latent_channels = 16 and the VAE of sd1.safetensors has 4",
    ),
    "of_another_factor": (lambda d: saved(d, ldm.vae(multiples=(1, 1, 2))), "another factor"),
    "without_widths": (
        lambda d: edited(d, block_out_channels=None),
        "has no block_out_channels",
    ),
    "flat": (
        lambda d: saved(d, ldm.vae() | {"decoder.conv_in.weight": (4,)}),
        "is not a whole VAE",
    ),
    "a_lora": (lambda d: saved(d, {"a.lora_up.weight": (2, 2)}), "is an adapter"),
    "missing": (lambda d: d / "nowhere.safetensors", "There is no VAE at"),
    "an_empty_folder": (empty, "config.json is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_vae_that_does_not_fit_is_refused(case, single_file_of, other_vae):
    make, words = REFUSED[case]
    base = config.Base(model=str(single_file_of("sd1")), vae=str(make(other_vae)))
    with pytest.raises(ModelError, match=words):
        load_base(base, torch.float32)
