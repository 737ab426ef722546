"""`convert`, `compose`, `resize`, `extract` and `merge` on the command line."""

import json

import pytest
import torch

from tests import ldm
from tests.lora.helpers import QUERY, delta_in_float64
from tests.lora.test_transform import TEXT, load, random_lora, random_text_lora
from tests.tiny import save_tiny_base
from trainer.cli.main import main
from trainer.families import FAMILIES
from trainer.lora import writer
from trainer.lora.formats.reader import read_adapter

FIRST = (random_lora(QUERY, 3, 0.7, 1), random_text_lora(2, 1.0, 3))
SECOND = (random_lora(QUERY, 5, 1.5, 4),)


@pytest.fixture
def files(tmp_path):
    """Returns two adapter files for Stable Diffusion 1.x."""
    paths = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    metadata = {"ss_base_model_version": "sd_v1"}
    for path, modules in zip(paths, (FIRST, SECOND), strict=True):
        writer.save_adapter(path, "kohya", modules, FAMILIES["sd1"], torch.float32, metadata)
    return paths


@pytest.fixture
def run(capsys):
    """Returns a function that runs a command and returns its exit status, output and errors."""

    def command(*arguments):
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


def deltas(path):
    modules = read_adapter(path).modules
    return {module.name: module.to(torch.float64).delta for module in modules}


def assert_equal(delta, expected, tolerance=1e-6):
    torch.testing.assert_close(delta, expected, rtol=0, atol=tolerance)


def last_json(out):
    return json.loads(out.splitlines()[-1])


def test_compose_adds_files_at_their_strengths(run, files, tmp_path):
    target = tmp_path / "both.safetensors"
    stack = ["--adapter", f"{files[0]}:0.5:2", "--adapter", files[1]]
    status, out, err = run("compose", *stack, "--precision", "fp32", "--output", target, "--json")
    assert status == 0, err
    assert last_json(out)["rank"] == "2 to 8"
    composed = deltas(target)
    query = 0.5 * delta_in_float64(FIRST[0]) + delta_in_float64(SECOND[0])
    assert_equal(composed[QUERY], query)
    assert_equal(composed[TEXT], 2.0 * delta_in_float64(FIRST[1]))


@pytest.mark.parametrize(("file_format", "name"), [("diffusers", "d.safetensors"), ("peft", "p")])
def test_convert_writes_the_same_adapter_in_another_format(run, files, tmp_path, file_format, name):
    target = tmp_path / name
    options = ["--to", file_format, "--precision", "fp32", "--family", "sd1", "--output", target]
    status, _, err = run("convert", files[0], *options)
    assert status == 0, err
    assert read_adapter(target).file_format == file_format
    converted, original = deltas(target), deltas(files[0])
    assert converted.keys() == original.keys()
    for key, delta in converted.items():
        assert_equal(delta, original[key])


def test_resize_reports_what_each_module_keeps(run, files, tmp_path):
    target = tmp_path / "small.safetensors"
    status, out, err = run("resize", files[0], "--rank", "2", "--output", target)
    assert status == 0, err
    assert "kept energy" in out and QUERY in out
    assert {module.rank for module in read_adapter(target).modules} == {2}


def test_a_merged_adapter_can_be_extracted_again(run, files, tiny_base, tmp_path):
    merged, extracted = tmp_path / "merged", tmp_path / "e.safetensors"
    options = ["--adapter", files[1], "--precision", "fp32", "--prove", "--json"]
    status, out, err = run("merge", "--base", tiny_base, *options, "--output", merged)
    assert status == 0, err
    assert float(last_json(out)["left_after_undoing"].split()[0]) < 1e-6
    bases = ["--base", tiny_base, "--tuned", merged]
    options = ["--rank", "5", "--precision", "fp32", "--output", extracted]
    status, _, err = run("extract", *bases, *options)
    assert status == 0, err
    found = deltas(extracted)
    assert found.keys() == {QUERY}
    assert_equal(found[QUERY], delta_in_float64(SECOND[0]), tolerance=1e-5)


def test_all_layers_of_stable_diffusion_3_are_extracted(run, tmp_path):
    """Two bases that differ everywhere. T5 cannot have an adapter."""
    plain, tuned = (save_tiny_base(tmp_path / str(seed) / "base", seed, "sd3") for seed in (0, 1))
    target = tmp_path / "e.safetensors"
    bases = ["--base", plain, "--tuned", tuned]
    status, out, err = run("extract", *bases, "--rank", "4", "--output", target)
    assert status == 0, err
    file = read_adapter(target)
    assert file.file_format == "diffusers" and "diffusers" in out
    components = {module.component for module in file.modules}
    assert components == {"transformer", "text_encoder", "text_encoder_2"}
    names = {module.name for module in file.modules}
    assert "time_text_embed.timestep_embedder.linear_1" in names


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_merge_writes_a_single_file_that_loads_as_the_same_family(run, tmp_path, kind):
    path = ldm.write_single_file(tmp_path / "base.safetensors", kind)
    prediction = "v" if kind == "sd2" else "auto"  # a file of 2.x does not contain it
    base = load(path, prediction)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    side = base.pipe.unet.get_submodule(name).weight.shape[0]
    module = random_lora(name, 2, 1.0, 1, outputs=side, inputs=(side,))
    adapter, target = tmp_path / "a.safetensors", tmp_path / "m.safetensors"
    writer.save_adapter(adapter, "kohya", [module], base.family, torch.float32, {})
    options = ["--prove", "--json", "--prediction", prediction, "--output", target]
    status, out, err = run("merge", "--base", path, "--adapter", adapter, *options)
    assert status == 0, err
    # The weights in the file are fp16.
    assert float(last_json(out)["left_after_undoing"].split()[0]) < 2e-3
    merged = load(target, prediction)
    assert merged.family is base.family
    weights = [b.pipe.unet.get_submodule(name).weight.double() for b in (merged, base)]
    assert_equal(weights[0] - weights[1], delta_in_float64(module), tolerance=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resize", "ONE", "--rank", "2", "--output", "TWO"], "already exists"),
        (["resize", "ONE", "--energy", "2", "--output", "NEW"], "--energy"),
        (["compose", "--adapter", "ONE:strong", "--output", "NEW"], "FILE:STRENGTH"),
        (
            ["merge", "--base", "BASE", "--adapter", "ONE", "--output", "NEW"],
            "Only a base that is a .safetensors file",
        ),
        (["extract", "--base", "BASE", "--tuned", "BASE", "--output", "NEW"], "do not differ"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    run, files, tiny_base, tmp_path, arguments, message
):
    new = tmp_path / "new.safetensors"
    places = {"ONE": files[0], "TWO": files[1], "BASE": tiny_base, "NEW": new}
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    content = files[1].read_bytes()
    status, _, err = run(*arguments)
    assert status == 1 and message in err and "Traceback" not in err
    assert not new.exists() and files[1].read_bytes() == content
