"""The metadata of an adapter file: what other programs read, and what stays private."""

import base64
import hashlib
import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.lora.helpers import lora
from trainer import config
from trainer.cli.describe import describe
from trainer.families import FAMILIES
from trainer.lora.formats.reader import read_adapter
from trainer.lora.metadata import metadata_for, metadata_of_tool
from trainer.models.safetensors_header import read_header
from trainer.runs import run_status

FAMILY = FAMILIES["sd1"]


def metadata(run):
    return metadata_for(
        run,
        FAMILY,
        modules=[lora("conv_in", torch.ones(16, 3, 1, 1), torch.ones(2, 16, 1, 1))],
        step=6,
        total_steps=6,
        sizes=[(512, 512), (512, 512), (640, 448)],
        captions=["a red star, night", "a red star"],
        base_hash="abc",
        prediction_type="epsilon",
        started=1.0,
        finished=2.0,
    )


def run_with(**settings):
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    return config.replace(config.RunConfig(), changes)


PRIVATE = {
    "dataset.folder": "/home/someone/folder-secret",
    "dataset.regularisation_folder": "relative/regularisation-secret",
    "dataset.repeats": ["repeats-secret=3"],
    "dataset.trigger": "zorbit",
    "base.model": "/home/someone/model-path-secret/base.safetensors",
    "base.vae": "/home/someone/vae-path-secret/own.vae.safetensors",
    "adapter.start_from": "/home/someone/start-path-secret/first.safetensors",
    "sampling.prompts": ["prompt-secret"],
    "sampling.negative_prompt": "negative-secret",
    "preset": "embedded-subject",
}
"""A run with a word "secret" in everything that may be private by default."""


@pytest.fixture
def private_run(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    return config.replace(config.RunConfig(), PRIVATE)


def with_switches(run, **switches):
    changes = {f"saving.include_{name}": value for name, value in switches.items()}
    return config.replace(run, changes)


def test_metadata_has_the_keys_that_other_programs_read(private_run):
    values = metadata(private_run)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in values.items())
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "16",
        "ss_network_args": '{"conv_dim": "16"}',
        "ss_num_train_images": "3",
        "ss_sd_model_hash": "abc",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": "zorbit",
        "modelspec.date": "1970-01-01T00:00:02",
    }
    assert {key: values[key] for key in expected} == expected
    assert values["atelier_preset_hash"]
    buckets = json.loads(values["ss_bucket_info"])["buckets"]
    assert buckets["1"] == {"resolution": [640, 448], "count": 1}


def test_nothing_private_is_in_the_metadata_by_default(private_run):
    values = json.dumps(metadata(private_run))
    assert "secret" not in values and "someone" not in values and "night" not in values
    settings = json.loads(metadata(private_run)["atelier_config"])
    assert settings["dataset"]["folder"] == settings["dataset"]["regularisation_folder"] == ""
    assert settings["dataset"]["repeats"] == []
    assert settings["base"]["model"] == "base.safetensors"
    assert settings["base"]["vae"] == "own.vae.safetensors"
    assert settings["adapter"]["start_from"] == "first.safetensors"


@pytest.mark.parametrize("repeats", [[], ["one=2"], ["one=2", "two/three=4"]])
def test_repeats_are_in_the_metadata_only_with_folders(repeats):
    for included in (False, True):
        run = run_with(dataset__repeats=repeats, saving__include_folders=included)
        settings = json.loads(metadata(run)["atelier_config"])
        assert settings["dataset"]["repeats"] == (repeats if included else [])


def test_a_hub_id_stays_in_the_metadata():
    run = run_with(base__model="stabilityai/some-model", base__vae="someone/some-vae")
    settings = json.loads(metadata(run)["atelier_config"])
    assert settings["base"]["model"] == "stabilityai/some-model"
    assert settings["base"]["vae"] == "someone/some-vae"


def test_captions_and_prompts_are_included_on_request(private_run):
    values = metadata(with_switches(private_run, captions=True))
    assert json.loads(values["ss_tag_frequency"]) == {"dataset": {"a red star": 2, "night": 1}}
    assert "prompt-secret" in values["atelier_config"]
    assert "negative-secret" in values["atelier_config"]
    assert "path-secret" not in json.dumps(values) and "folder-secret" not in json.dumps(values)


def test_folders_are_included_on_request_but_never_the_home_folder(private_run):
    values = metadata(with_switches(private_run, folders=True))
    dirs = json.loads(values["ss_dataset_dirs"])
    assert dirs == {"folder-secret": {"n_repeats": 1, "img_count": 3}}
    assert "ss_tag_frequency" not in values
    settings = json.loads(values["atelier_config"])
    assert settings["dataset"]["folder"] == "~/folder-secret"
    assert settings["base"]["model"] == "~/model-path-secret/base.safetensors"
    assert settings["base"]["vae"] == "~/vae-path-secret/own.vae.safetensors"
    assert "someone" not in json.dumps(values) and "prompt-secret" not in json.dumps(values)


def test_the_settings_can_be_left_out(private_run):
    assert "atelier_config" in metadata(private_run)
    assert "atelier_config" not in metadata(with_switches(private_run, config=False))


def test_the_settings_in_the_file_repeat_the_run():
    run = run_with(adapter__rank=7)
    assert config.from_dict(json.loads(metadata(run)["atelier_config"])) == run


@pytest.mark.parametrize("included", [True, False])
def test_a_thumbnail_is_in_the_finished_file_only_on_request(train_tiny, included):
    folder = train_tiny({"saving.include_thumbnail": included})
    status = run_status.read_status(folder)
    step = status.finished.file_step
    finished = folder / status.finished.file
    save = folder / next(adapter.file for adapter in status.adapters if adapter.step == step)
    assert ("modelspec.thumbnail" in read_header(finished).metadata) == included
    assert "modelspec.thumbnail" not in read_header(save).metadata
    tensors, original = load_file(finished), load_file(save)
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in tensors)
    assert describe(finished)


@pytest.fixture(scope="module")
def run_with_thumbnail(tmp_path_factory, tiny_base, tiny_dataset):
    """Returns the folder and status of a short run whose file has a thumbnail."""
    from trainer.runs import run_folder
    from trainer.training.runner import run_in

    patch = pytest.MonkeyPatch()
    patch.setenv("ATELIER_OUTPUTS", str(tmp_path_factory.mktemp("thumbnail")))
    settings = {
        "name": "tiny",
        "base.model": str(tiny_base),
        "dataset.folder": str(tiny_dataset),
        "dataset.resolution": 32,
        "dataset.bucket_step": 8,
        "training.steps": 1,
        "saving.saves": 1,
        "saving.include_thumbnail": True,
        "sampling.inference_steps": 2,
        "sampling.prompts": ["image number 0"],
    }
    folder = run_folder.create(config.replace(config.RunConfig(), settings))
    assert run_in(folder) == 0, run_status.read_status(folder).message
    yield folder, run_status.read_status(folder)
    patch.undo()


def test_the_thumbnail_shows_the_sample_of_the_save(run_with_thumbnail):
    folder, status = run_with_thumbnail
    thumbnail = read_header(folder / status.finished.file).metadata["modelspec.thumbnail"]
    kind, _, content = thumbnail.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/jpeg;base64" and image.format == "JPEG"
    assert not image.info.get("exif")
    file = next(s.file for s in status.samples if s.step == status.finished.file_step)
    sample = Image.open(folder / file).convert("RGB")
    assert image.size == sample.size
    # JPEG blurs colours, so the two are compared at low resolution.
    rough = [np.asarray(i.resize((4, 4), Image.Resampling.BOX), float) for i in (image, sample)]
    assert abs(rough[0] - rough[1]).max() < 6


def test_the_hash_of_a_file_with_a_thumbnail_is_valid(run_with_thumbnail):
    folder, status = run_with_thumbnail
    content = (folder / status.finished.file).read_bytes()
    digest = hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()
    assert read_header(folder / status.finished.file).metadata["sshs_model_hash"] == digest


def test_a_tool_passes_on_neither_thumbnail_nor_hashes(run_with_thumbnail):
    folder, status = run_with_thumbnail
    file = read_adapter(folder / status.finished.file)
    assert "modelspec.thumbnail" in file.metadata and "sshs_model_hash" in file.metadata
    values = metadata_of_tool("other", file.modules, [file], FAMILY)
    assert "modelspec.thumbnail" not in values and "sshs_model_hash" not in values
    assert values["ss_output_name"] == "other"
    assert values["atelier_made_from"] == (folder / status.finished.file).stem
    assert values["ss_seed"] == file.metadata["ss_seed"]
