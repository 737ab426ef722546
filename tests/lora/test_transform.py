"""Tools for adapters that are there: each against sums of scale * up @ down in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import ldm
from tests.tiny import save_tiny_base
from trainer import config
from trainer.cli.main import main
from trainer.errors import ModelError
from trainer.families import FAMILIES, load_base
from trainer.lora import merging, transform, writer
from trainer.lora.apply import WeightedAdapter
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import AdapterFile, read_adapter

FAMILY = FAMILIES["sd1"]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.v_proj"


def lora(name, rank, scale, seed, component="unet", outputs=16, inputs=(16,)):
    draw = torch.Generator().manual_seed(seed)
    up = torch.randn(outputs, rank, *[1] * (len(inputs) - 1), generator=draw) * 0.1
    return AdaptedModule(
        component,
        name,
        "lora",
        {
            "lora_down.weight": torch.randn(rank, *inputs, generator=draw) * 0.1,
            "lora_up.weight": up,
        },
        scale,
    )


def file_of(*modules, path="a.safetensors"):
    return AdapterFile(
        Path(path),
        "kohya",
        list(modules),
        {"ss_base_model_version": "sd_v1"},
        "float32",
        [],
    )


def saved(path, *modules):
    writer.save_adapter(
        path, "kohya", modules, FAMILY, torch.float32, {"ss_base_model_version": "sd_v1"}
    )
    return str(path)


def truth(module):
    tensors = {leaf: tensor.double() for leaf, tensor in module.tensors.items()}
    down = tensors["lora_down.weight"]
    return (module.scale * tensors["lora_up.weight"].flatten(1) @ down.flatten(1)).reshape(
        -1, *down.shape[1:]
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return save_tiny_base(folder / "one"), save_tiny_base(folder / "two", seed=1)


def load(path, prediction="auto"):
    return load_base(config.Base(model=str(path), prediction=prediction), torch.float32)


def test_a_composition_is_the_sum_of_its_parts():
    """Ranks, scales and strengths of their own; a convolution; a LoHa and Tucker's form, which are multiplied out."""
    draw = torch.Generator().manual_seed(9)
    loha = {
        n: torch.randn(s, generator=draw)
        for n, s in {
            "hada_w1_a": (16, 2),
            "hada_w1_b": (2, 16),
            "hada_w2_a": (16, 2),
            "hada_w2_b": (2, 16),
        }.items()
    }
    first = [
        lora(QUERY, 3, 0.7, 1),
        lora(CONV, 2, 2.0, 2, inputs=(16, 3, 3)),
        lora(TEXT, 2, 1.0, 3, "text_encoder", 32, (32,)),
    ]
    second = [
        lora(QUERY, 5, 1.5, 4),
        AdaptedModule("unet", "mid_block.attentions.0.proj_in", "loha", loha, 0.25),
    ]
    composed = {
        m.name: m
        for m in transform.compose(
            [
                WeightedAdapter(file_of(*first), 0.5, 2.0),
                WeightedAdapter(file_of(*second), -1.0, 0.0),
            ]
        )
    }
    wanted = {
        QUERY: 0.5 * truth(first[0]) - truth(second[0]),
        CONV: 0.5 * truth(first[1]),
        TEXT: 2.0 * truth(first[2]),
        "mid_block.attentions.0.proj_in": -second[1].to(torch.float64).delta,
    }
    assert composed.keys() == wanted.keys() and composed[QUERY].rank == 8
    for name, delta in wanted.items():
        torch.testing.assert_close(
            composed[name].to(torch.float64).delta,
            delta,
            rtol=0,
            atol=1e-6 * float(delta.abs().max()),
        )


def test_resizing_is_the_nearest_of_its_rank_and_says_what_is_kept():
    module = lora(QUERY, 6, 1.3, 5)
    sizes = torch.linalg.svdvals(truth(module))
    for rank in (1, 3, 6, 9):
        (small,), (kept,) = transform.resize([module], rank=rank)
        error = float((small.to(torch.float64).delta - truth(module)).norm())
        assert error == pytest.approx(
            float(sizes[min(rank, 6) :].norm()), abs=1e-6
        )  # Eckart & Young
        assert kept.energy == pytest.approx(
            float(sizes[:rank].square().sum() / sizes.square().sum())
        ) and kept.rank == min(rank, 6)
    for energy in (0.5, 0.9):
        (_,), (kept,) = transform.resize([module], energy=energy)
        assert kept.energy >= energy and (
            kept.rank == 1
            or float(sizes[: kept.rank - 1].square().sum() / sizes.square().sum()) < energy
        )
    weak, strong = lora(QUERY, 4, 0.1, 6), lora(CONV, 4, 3.0, 7, inputs=(16, 3, 3))
    _, kept = transform.resize([weak, strong], rank=2)
    squares = [torch.linalg.svdvals(truth(m).flatten(1)).square() for m in (weak, strong)]
    assert transform.total_energy(kept) == pytest.approx(
        float(sum(s[:2].sum() for s in squares) / sum(s.sum() for s in squares))
    )
    idle = AdaptedModule(
        "unet",
        QUERY,
        "lora",
        {"lora_down.weight": torch.ones(4, 16), "lora_up.weight": torch.zeros(16, 4)},
        1.0,
    )
    (nothing,), _ = transform.resize([idle], rank=2)
    assert nothing.rank == 1 and not nothing.delta.any()


def test_what_each_rank_would_keep():
    modules = [lora(QUERY, 4, 0.5, 6), lora(CONV, 5, 3.0, 7, inputs=(16, 3, 3))]
    rows = transform.energy_by_rank(modules)
    assert [rank for rank, _, _ in rows] == [1, 2, 4, 5]
    for rank, whole, worst in rows:
        _, kept = transform.resize(modules, rank=rank)
        assert (whole, worst) == (
            pytest.approx(transform.total_energy(kept)),
            pytest.approx(min(module.energy for module in kept)),
        )


def test_merging_adds_the_deltas_and_can_be_undone(bases, tmp_path):
    one, base = load(bases[0]), load(bases[0])
    query, value = lora(QUERY, 3, 0.7, 1), lora(TEXT, 2, 1.0, 3, "text_encoder", 32, (32,))
    weight = base.pipe.unet.get_submodule(QUERY).weight.double()
    lengths = (weight + truth(query)).norm(dim=1, keepdim=True) * 1.2
    dora = AdaptedModule(
        "unet", QUERY, "dora", {**query.tensors, "dora_scale": lengths.float()}, query.scale
    )
    layers = [
        WeightedAdapter(file_of(query, value), 0.5, 2.0),
        WeightedAdapter(file_of(dora), 1.0, 1.0),
    ]
    added = merging.merge(base, layers)
    wanted = weight + 0.5 * truth(query) + (1.2 * (weight + truth(query)) - weight)
    torch.testing.assert_close(
        base.pipe.unet.get_submodule(QUERY).weight.double(), wanted, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(added["text_encoder", TEXT], 2.0 * truth(value), rtol=0, atol=1e-9)
    assert merging.remaining_difference(base, one, added) < 1e-6
    base.pipe.unet.conv_in.weight.data[0, 0, 0, 0] += 0.1  # what was not an adapter's is noticed
    assert merging.remaining_difference(base, one, added) > 1e-3


def test_the_difference_of_two_bases_becomes_an_adapter(bases):
    plain, tuned = load(bases[0]), load(bases[0])
    change, conv = lora(QUERY, 2, 1.0, 1), lora(CONV, 1, 1.0, 2, inputs=(16, 3, 3))
    merging.merge(tuned, [WeightedAdapter(file_of(change, conv), 1.0, 1.0)])
    modules, kept = transform.extract(plain, tuned, rank=2)
    assert [m.name for m in modules] == [QUERY] and kept[0].energy > 1 - 1e-9
    torch.testing.assert_close(modules[0].to(torch.float64).delta, truth(change), rtol=0, atol=1e-6)
    modules, _ = transform.extract(plain, tuned, rank=2, conv=True)
    assert {m.name for m in modules} == {QUERY, CONV}
    with pytest.raises(ModelError, match="do not differ"):
        transform.extract(plain, plain, rank=2)


def test_every_layer_of_a_stable_diffusion_3_is_told_from_another(tmp_path, capsys):
    """As of two whole trainings, its three text encoders among them; T5 has no place in an adapter."""
    plain, tuned = (save_tiny_base(tmp_path / str(seed) / "base", seed, "sd3") for seed in (0, 1))
    code, out, _ = run(
        capsys,
        "extract",
        "--base",
        plain,
        "--tuned",
        tuned,
        "--rank",
        "4",
        "--output",
        tmp_path / "e.safetensors",
    )
    file = read_adapter(tmp_path / "e.safetensors")
    assert (
        code == 0 and "dialect:              diffusers" in out and file.file_format == "diffusers"
    )
    assert {module.component for module in file.modules} == {
        "transformer",
        "text_encoder",
        "text_encoder_2",
    }
    assert "time_text_embed.timestep_embedder.linear_1" in {module.name for module in file.modules}


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_command_line_converts_composes_resizes_merges_and_extracts(bases, tmp_path, capsys):
    one = saved(
        tmp_path / "one.safetensors",
        lora(QUERY, 3, 0.7, 1),
        lora(TEXT, 2, 1.0, 3, "text_encoder", 32, (32,)),
    )
    two = saved(tmp_path / "two.safetensors", lora(QUERY, 5, 1.5, 4))
    code, out, _ = run(
        capsys,
        "compose",
        "--adapter",
        f"{one}:0.5:2",
        "--adapter",
        two,
        "--precision",
        "fp32",
        "--output",
        tmp_path / "both.safetensors",
        "--json",
    )
    assert code == 0 and json.loads(out.splitlines()[-1])["rank"] == "2 to 8"
    both = {m.name: m for m in read_adapter(tmp_path / "both.safetensors").modules}
    torch.testing.assert_close(
        both[QUERY].delta.double(),
        0.5 * truth(lora(QUERY, 3, 0.7, 1)) + truth(lora(QUERY, 5, 1.5, 4)),
        rtol=0,
        atol=1e-6,
    )

    for dialect, name in (("diffusers", "d.safetensors"), ("peft", "p")):
        assert (
            run(
                capsys,
                "convert",
                tmp_path / "both.safetensors",
                "--to",
                dialect,
                "--precision",
                "fp32",
                "--output",
                tmp_path / name,
                "--family",
                "sd1",
            )[0]
            == 0
        )
        again = {m.name: m for m in read_adapter(tmp_path / name).modules}
        assert again.keys() == both.keys() and read_adapter(tmp_path / name).file_format == dialect
        for key, module in again.items():
            torch.testing.assert_close(module.delta, both[key].delta, rtol=0, atol=1e-6)

    code, out, _ = run(
        capsys,
        "resize",
        tmp_path / "both.safetensors",
        "--rank",
        "2",
        "--output",
        tmp_path / "small.safetensors",
    )
    assert code == 0 and "kept energy" in out and QUERY in out

    code, out, _ = run(
        capsys,
        "merge",
        "--base",
        bases[0],
        "--adapter",
        two,
        "--precision",
        "fp32",
        "--prove",
        "--json",
        "--output",
        tmp_path / "merged",
    )
    assert (
        code == 0
        and float(json.loads(out.splitlines()[-1])["left_after_undoing"].split()[0]) < 1e-6
    )
    code, out, _ = run(
        capsys,
        "extract",
        "--base",
        bases[0],
        "--tuned",
        tmp_path / "merged",
        "--rank",
        "5",
        "--precision",
        "fp32",
        "--output",
        tmp_path / "e.safetensors",
    )
    assert code == 0, out
    (module,) = read_adapter(tmp_path / "e.safetensors").modules
    torch.testing.assert_close(
        module.delta.double(), truth(lora(QUERY, 5, 1.5, 4)), rtol=0, atol=1e-5
    )

    for arguments, words in (
        (("resize", one, "--rank", "2", "--output", two), "already exists"),
        (
            ("resize", one, "--energy", "2", "--output", tmp_path / "x.safetensors"),
            "--energy above 0",
        ),
        (
            ("compose", "--adapter", f"{one}:strong", "--output", tmp_path / "x.safetensors"),
            "FILE:STRENGTH",
        ),
        (
            ("merge", "--base", bases[0], "--adapter", one, "--output", tmp_path / "x.safetensors"),
            "Only a base that is a .safetensors file",
        ),
        (
            (
                "extract",
                "--base",
                bases[0],
                "--tuned",
                bases[0],
                "--output",
                tmp_path / "x.safetensors",
            ),
            "do not differ",
        ),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 1 and words in err and "Traceback" not in err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_single_file_keeps_its_layout_and_every_other_tensor(tmp_path, capsys, kind):
    """Also where OpenCLIP has q, k and v in one tensor."""
    path = ldm.write_single_file(tmp_path / "base.safetensors", kind)
    prediction = "v" if kind == "sd2" else "auto"  # which a file of 2.x does not tell
    plain = load(path, prediction)
    block = next(
        n
        for n, _ in plain.pipe.unet.named_modules()
        if n.endswith("transformer_blocks.0.attn2.to_k")
    )
    encoder = list(plain.family.text_encoders(plain.pipe))[-1]
    modules = []
    for seed, (component, name) in enumerate(
        [
            ("unet", block),
            (encoder, "encoder.layers.1.self_attn.k_proj"),
            (encoder, "encoder.layers.0.mlp.fc1"),
        ]
    ):
        part = plain.components[component]
        weight = (
            (part.text_model if hasattr(part, "text_model") and component != "unet" else part)
            .get_submodule(name)
            .weight
        )
        modules.append(lora(name, 2, 1.0, seed, component, weight.shape[0], (weight.shape[1],)))
    adapter = tmp_path / "a.safetensors"
    writer.save_adapter(adapter, "kohya", modules, plain.family, torch.float32, {})
    code, out, err = run(
        capsys,
        "merge",
        "--base",
        path,
        "--adapter",
        adapter,
        "--prove",
        "--json",
        "--prediction",
        prediction,
        "--output",
        tmp_path / "m.safetensors",
    )
    assert code == 0, err
    assert (
        float(json.loads(out.splitlines()[-1])["left_after_undoing"].split()[0]) < 2e-3
    )  # the file is fp16
    before, after = load_file(path), load_file(tmp_path / "m.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert (
        before.keys() == after.keys()
        and len(changed) == 3
        and all(before[n].dtype == after[n].dtype for n in before)
    )
    assert load(tmp_path / "m.safetensors", prediction).family is plain.family
