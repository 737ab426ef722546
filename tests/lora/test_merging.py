"""Adapters merged into the weights of a base."""

import pytest
import torch
from safetensors.torch import load_file

from tests import ldm
from tests.lora.helpers import QUERY, delta_in_float64
from tests.lora.test_transform import (
    TEXT,
    load,
    random_lora,
    random_text_lora,
    weighted,
)
from trainer.errors import ModelError
from trainer.lora import merging
from trainer.lora.formats.adapted_module import AdaptedModule


@pytest.fixture
def base(tiny_base):
    return load(tiny_base)


def weight_of(base):
    return base.pipe.unet.get_submodule(QUERY).weight


@pytest.mark.parametrize(("strength", "text_strength"), [(1.0, 1.0), (0.5, 2.0), (-1.0, 0.0)])
def test_merging_adds_delta_w_at_the_strengths(base, strength, text_strength):
    query, value = random_lora(QUERY, 3, 0.7, 1), random_text_lora(2, 1.0, 3)
    before = weight_of(base).double()
    changes = merging.merge(base, [weighted(strength, text_strength, query, value)])
    expected = before + strength * delta_in_float64(query)
    torch.testing.assert_close(weight_of(base).double(), expected, rtol=0, atol=1e-6)
    expected_text = text_strength * delta_in_float64(value)
    if text_strength:
        change = changes["text_encoder", TEXT]
        torch.testing.assert_close(change, expected_text, rtol=0, atol=1e-9)
    else:
        assert ("text_encoder", TEXT) not in changes


def test_every_adapter_changes_the_original_weights(base):
    """The norms of a DoRA apply to the weights without the other adapter."""
    query = random_lora(QUERY, 3, 0.7, 1)
    before, delta = weight_of(base).double(), delta_in_float64(query)
    norms = (before + delta).norm(dim=1, keepdim=True) * 1.2
    tensors = {**query.tensors, "dora_scale": norms.float()}
    dora = AdaptedModule("unet", QUERY, "dora", tensors, query.scale)
    merging.merge(base, [weighted(0.5, 1.0, query), weighted(1.0, 1.0, dora)])
    expected = before + 0.5 * delta + (1.2 * (before + delta) - before)
    torch.testing.assert_close(weight_of(base).double(), expected, rtol=0, atol=1e-6)


def test_nothing_remains_after_the_changes_are_subtracted(base, tiny_base):
    changes = merging.merge(base, [weighted(0.5, 2.0, random_lora(QUERY, 3, 0.7, 1))])
    assert merging.remaining_difference(base, load(tiny_base), changes) < 1e-6


@pytest.mark.parametrize("change", [0.01, -0.1])
def test_any_other_change_of_the_base_remains(base, tiny_base, change):
    changes = merging.merge(base, [weighted(0.5, 2.0, random_lora(QUERY, 3, 0.7, 1))])
    weight = base.pipe.unet.conv_in.weight.data
    largest = float(weight.abs().max())
    weight[0, 0, 0, 0] += change
    remaining = merging.remaining_difference(base, load(tiny_base), changes)
    assert remaining == pytest.approx(abs(change) / largest, rel=1e-3)


def test_an_adapter_that_does_not_fit_changes_nothing(base):
    before = weight_of(base).clone()
    fitting, other = random_lora(QUERY, 3, 0.7, 1), random_lora(QUERY, 3, 0.7, 1, inputs=(99,))
    with pytest.raises(ModelError, match="does not fit"):
        merging.merge(base, [weighted(1.0, 1.0, fitting), weighted(1.0, 1.0, other)])
    assert torch.equal(weight_of(base), before)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_changes_are_added_to_the_tensors_of_a_single_file(tmp_path, kind):
    """Every other tensor is identical. OpenCLIP has q, k and v in one tensor."""
    path = ldm.write_single_file(tmp_path / "base.safetensors", kind)
    base = load(path, "v" if kind == "sd2" else "auto")  # a file of 2.x does not contain it
    encoder = list(base.family.text_encoders(base.pipe))[-1]
    unet_module = next(
        name
        for name, _ in base.pipe.unet.named_modules()
        if name.endswith("transformer_blocks.0.attn2.to_k")
    )
    changes = {}
    for component, name in [
        ("unet", unet_module),
        (encoder, "encoder.layers.1.self_attn.k_proj"),
        (encoder, "encoder.layers.0.mlp.fc1"),
    ]:
        part = base.components[component]
        has_level = component == encoder and hasattr(part, "text_model")
        module = f"text_model.{name}" if has_level else name
        weight = part.get_submodule(module).weight
        changes[component, module] = torch.full(weight.shape, 0.5, dtype=torch.float64)
    before, after = load_file(path), merging.merged_checkpoint(path, base, changes)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 3
    numbers = sum(int((before[name] != after[name]).sum()) for name in changed)
    assert numbers == sum(change.numel() for change in changes.values())
    for name in changed:
        difference = (after[name].double() - before[name].double())[before[name] != after[name]]
        torch.testing.assert_close(difference, torch.full_like(difference, 0.5), rtol=0, atol=1e-2)


def test_a_single_file_with_other_values_is_refused(tmp_path):
    path = ldm.write_single_file(tmp_path / "base.safetensors", "sd1")
    base = load(path)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = base.pipe.unet.get_submodule(name).weight.data
    weight += 0.01
    changes = {("unet", name): torch.zeros_like(weight, dtype=torch.float64)}
    with pytest.raises(ModelError, match="has no weight for unet.mid_block"):
        merging.merged_checkpoint(path, base, changes)
