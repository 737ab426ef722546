"""Composing, resizing and extracting adapters, compared with sums of scale * B A in float64."""

from pathlib import Path

import pytest
import torch

from tests.lora.helpers import CONV, QUERY, delta_in_float64
from tests.tiny import save_tiny_base
from trainer import config
from trainer.errors import ModelError
from trainer.families import load_base
from trainer.lora import merging, transform
from trainer.lora.apply import WeightedAdapter
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import AdapterFile

TEXT = "encoder.layers.0.self_attn.v_proj"
SQUARE = "mid_block.attentions.0.proj_in"


def random_lora(name, rank, scale, seed, component="unet", outputs=16, inputs=(16,)):
    draw = torch.Generator().manual_seed(seed)
    kernel = [1] * (len(inputs) - 1)
    tensors = {
        "lora_up.weight": 0.1 * torch.randn(outputs, rank, *kernel, generator=draw),
        "lora_down.weight": 0.1 * torch.randn(rank, *inputs, generator=draw),
    }
    return AdaptedModule(component, name, "lora", tensors, scale)


def random_conv(rank, scale, seed):
    return random_lora(CONV, rank, scale, seed, inputs=(16, 3, 3))


def random_text_lora(rank, scale, seed):
    return random_lora(TEXT, rank, scale, seed, "text_encoder", 32, (32,))


def random_loha(name, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "hada_w1_a": (16, 2),
        "hada_w1_b": (2, 16),
        "hada_w2_a": (16, 2),
        "hada_w2_b": (2, 16),
    }
    tensors = {leaf: torch.randn(shape, generator=draw) for leaf, shape in shapes.items()}
    return AdaptedModule("unet", name, "loha", tensors, scale)


def diagonal(values, name=QUERY):
    """Returns a LoRA with these singular values."""
    root = torch.tensor(values, dtype=torch.float64).sqrt().float()
    tensors = {"lora_up.weight": torch.diag(root), "lora_down.weight": torch.diag(root)}
    return AdaptedModule("unet", name, "lora", tensors, 1.0)


def weighted(strength, text_strength, *modules):
    file = AdapterFile(Path("a.safetensors"), "kohya", list(modules), {}, "float32", [])
    return WeightedAdapter(file, strength, text_strength)


def assert_delta(module, expected):
    tolerance = 1e-6 * float(expected.abs().max())
    delta = module.to(torch.float64).delta
    torch.testing.assert_close(delta, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "strengths",
    [(1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, -3.0), (0.0, 1.0, 2.0)],
)
def test_each_adapter_is_composed_at_its_strength(strengths):
    modules = [random_lora(QUERY, rank, 0.7, seed=rank) for rank in (2, 3, 4)]
    adapters = [
        weighted(strength, 9.0, module) for strength, module in zip(strengths, modules, strict=True)
    ]
    (composed,) = transform.compose(adapters)
    deltas = [
        strength * delta_in_float64(module)
        for strength, module in zip(strengths, modules, strict=True)
    ]
    assert_delta(composed, sum(deltas))
    assert composed.rank == sum(m.rank for m, s in zip(modules, strengths, strict=True) if s)


@pytest.mark.parametrize("text_strengths", [(2.0, 1.0), (1.0, -0.5), (0.0, 3.0)])
def test_text_encoders_are_composed_at_their_own_strength(text_strengths):
    modules = [random_text_lora(2, 1.0, seed) for seed in (1, 2)]
    first, second = text_strengths
    adapters = [weighted(7.0, first, modules[0]), weighted(5.0, second, modules[1])]
    (composed,) = transform.compose(adapters)
    expected = first * delta_in_float64(modules[0]) + second * delta_in_float64(modules[1])
    assert_delta(composed, expected)


def test_modules_of_one_adapter_only_are_composed_unchanged():
    conv, loha = random_conv(2, 2.0, 1), random_loha(SQUARE, 0.25, 2)
    composed = transform.compose([weighted(0.5, 1.0, conv), weighted(-1.0, 1.0, loha)])
    by_name = {module.name: module for module in composed}
    assert by_name.keys() == {CONV, SQUARE}
    assert_delta(by_name[CONV], 0.5 * delta_in_float64(conv))
    assert_delta(by_name[SQUARE], -loha.to(torch.float64).delta)


def test_adapters_of_different_sizes_are_not_composed():
    other = random_lora(QUERY, 2, 1.0, 1, inputs=(32,))
    with pytest.raises(ModelError, match="do not fit each other: unet.down_blocks"):
        transform.compose([weighted(1, 1, random_lora(QUERY, 2, 1.0, 1)), weighted(1, 1, other)])


@pytest.mark.parametrize(
    "operation", [transform.resize, lambda m: transform.compose([weighted(1, 1, *m)])]
)
def test_a_dora_is_neither_resized_nor_composed(operation):
    module = random_lora(QUERY, 2, 1.0, 1)
    tensors = module.tensors | {"dora_scale": torch.ones(16, 1)}
    with pytest.raises(ModelError, match="The DoRA on .* Merge it into the base instead"):
        operation([AdaptedModule("unet", QUERY, "dora", tensors, 1.0)])


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_resizing_gives_the_nearest_adapter_of_its_rank(rank):
    """Eckart & Young: the error is the norm of the remaining singular values."""
    module = random_lora(QUERY, 6, 1.3, 5)
    values = torch.linalg.svdvals(delta_in_float64(module))
    (small,), (kept,) = transform.resize([module], rank=rank)
    error = float((small.to(torch.float64).delta - delta_in_float64(module)).norm())
    assert error == pytest.approx(float(values[min(rank, 6) :].norm()), abs=1e-6)
    share = float(values[:rank].square().sum() / values.square().sum())
    assert kept.energy == pytest.approx(share) and kept.rank == small.rank == min(rank, 6)


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_resizing_keeps_the_smallest_rank_with_the_requested_energy(energy):
    module = random_lora(QUERY, 6, 1.3, 5)
    squares = torch.linalg.svdvals(delta_in_float64(module)).square()
    (_,), (kept,) = transform.resize([module], energy=energy)
    assert kept.energy >= energy
    assert kept.rank == 1 or float(squares[: kept.rank - 1].sum() / squares.sum()) < energy


@pytest.mark.parametrize(
    ("energy", "rank"), [(1.0, 3), (0.9999, 3), (0.9991, 2), (0.9989, 2), (0.95, 1), (0.9, 1)]
)
def test_the_requested_energy_is_kept_exactly(energy, rank):
    """The squared singular values are 0.9500, 0.0492 and 0.0008 of their sum."""
    module = diagonal([0.9500**0.5, 0.0492**0.5, 0.0008**0.5])
    (small,), (kept,) = transform.resize([module], energy=energy)
    assert (small.rank, kept.rank) == (rank, rank)


@pytest.mark.parametrize(("ratio", "rank"), [(1e-2, 2), (1e-6, 2), (1e-10, 2), (1e-14, 1)])
def test_small_singular_values_are_kept_but_rounding_is_not(ratio, rank):
    """A full product has two singular values of this ratio."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    product = torch.outer(first, first) + ratio * torch.outer(second, second)
    tensors = {"lokr_w1": torch.ones(1, 1), "lokr_w2": product.double()}
    up, down = transform.low_rank_pair(AdaptedModule("unet", QUERY, "lokr", tensors, 1.0))
    assert up.shape[1] == down.shape[0] == rank


def test_an_adapter_that_changes_nothing_is_resized_to_rank_1():
    tensors = {"lora_down.weight": torch.ones(4, 16), "lora_up.weight": torch.zeros(16, 4)}
    idle = AdaptedModule("unet", QUERY, "lora", tensors, 1.0)
    (small,), (kept,) = transform.resize([idle], rank=2)
    assert small.rank == kept.rank == 1 and not small.delta.any() and kept.energy == 1.0


def test_the_total_energy_weighs_modules_by_their_singular_values():
    weak, strong = random_lora(QUERY, 4, 0.1, 6), random_conv(4, 3.0, 7)
    _, kept = transform.resize([weak, strong], rank=2)
    squares = []
    for module in (weak, strong):
        squares.append(torch.linalg.svdvals(delta_in_float64(module).flatten(1)).square())
    expected = sum(s[:2].sum() for s in squares) / sum(s.sum() for s in squares)
    assert transform.total_energy(kept) == pytest.approx(float(expected))


def test_energy_by_rank_is_what_resizing_keeps():
    modules = [random_lora(QUERY, 4, 0.5, 6), random_conv(5, 3.0, 7)]
    rows = transform.energy_by_rank(modules)
    assert [rank for rank, _, _ in rows] == [1, 2, 4, 5]
    for rank, total, worst in rows:
        _, kept = transform.resize(modules, rank=rank)
        assert total == pytest.approx(transform.total_energy(kept))
        assert worst == pytest.approx(min(module.energy for module in kept))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("bases") / "one")


def load(path, prediction="auto"):
    return load_base(config.Base(model=str(path), prediction=prediction), torch.float32)


@pytest.fixture
def tuned(base_folder):
    """Returns a base and what was added to it: a linear layer and a convolution."""
    base = load(base_folder)
    linear, conv = random_lora(QUERY, 2, 1.0, 1), random_conv(1, 1.0, 2)
    merging.merge(base, [weighted(1.0, 1.0, linear, conv)])
    return base, linear, conv


def test_the_difference_of_two_bases_is_extracted_exactly(base_folder, tuned):
    (module,), (kept,) = transform.extract(load(base_folder), tuned[0], rank=2)
    assert module.name == QUERY and kept.energy > 1 - 1e-9
    expected = delta_in_float64(tuned[1])
    torch.testing.assert_close(module.to(torch.float64).delta, expected, rtol=0, atol=1e-6)


def test_convolutions_are_extracted_on_request(base_folder, tuned):
    modules, _ = transform.extract(load(base_folder), tuned[0], rank=2, conv=True)
    by_name = {module.name: module for module in modules}
    assert by_name.keys() == {QUERY, CONV}
    expected = delta_in_float64(tuned[2])
    torch.testing.assert_close(by_name[CONV].to(torch.float64).delta, expected, rtol=0, atol=1e-6)


def test_bases_that_do_not_differ_give_no_adapter(base_folder):
    with pytest.raises(ModelError, match="do not differ"):
        transform.extract(load(base_folder), load(base_folder), rank=2)


def test_bases_of_different_families_give_no_adapter(base_folder, base_of):
    with pytest.raises(ModelError, match="different families"):
        transform.extract(load(base_folder), load(base_of("sdxl")), rank=2)
