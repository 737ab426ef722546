"""The adapter inside a real (tiny) model."""

import pytest
import torch

from trainer import config
from trainer.families import load_base
from trainer.lora import inject, targets
from trainer.training import estimate


@pytest.fixture
def base(tiny_base):
    return load_base(config.Base(model=str(tiny_base)), torch.float32)


def injected(base, part="unet", **settings):
    component = getattr(base.pipe, part)
    adapter = config.Adapter(**({"rank": 2, "alpha": 4.0} | settings))
    inject.inject(component, part, adapter, seed=1)
    return component


def predict(base):
    with torch.no_grad():
        conditioning = base.family.encode_prompts(base.pipe, ["a red star"])
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        embeds = conditioning["prompt_embeds"]
        return base.pipe.unet(latents, 500, encoder_hidden_states=embeds).sample


def test_a_new_adapter_changes_nothing_and_a_trained_one_does(base):
    before = predict(base)
    components = [injected(base, part) for part in ("unet", "text_encoder")]
    assert torch.equal(predict(base), before)
    draw = torch.Generator().manual_seed(0)
    for component in components:
        for name, parameter in inject.trainable(component).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=draw)
    assert not torch.allclose(predict(base), before)


@pytest.mark.parametrize(
    ("part", "ends"), [("unet", targets.ATTENTION), ("text_encoder", targets.TEXT_ATTENTION)]
)
def test_exactly_the_attention_projections_are_adapted(base, part, ends):
    component = injected(base, part)
    expected = set()
    for name, layer in component.named_modules():
        name = name.removesuffix(".base_layer")
        if isinstance(layer, torch.nn.Linear) and name.endswith(ends):
            expected.add(name)
    adapted = {module.name for module in inject.adapted_modules({part: component})}
    assert adapted == expected and len(expected) >= 8
    assert all("lora_" in name for name in inject.trainable(component))


@pytest.mark.parametrize("text_rate", [0.0, 1e-4])
def test_the_number_of_parameters_is_equal_to_the_estimate(base, tiny_base, text_rate):
    settings = {
        "base.model": str(tiny_base),
        "adapter.rank": 3,
        "training.text_encoder_learning_rate": text_rate,
    }
    run = config.replace(config.RunConfig(), settings)
    parts = ["unet", *(["text_encoder"] if text_rate else [])]
    parameters = [
        p for part in parts for p in inject.trainable(injected(base, part, rank=3)).values()
    ]
    assert estimate.trainable_parameters(run) == sum(p.numel() for p in parameters)


def test_the_adapter_is_float32_on_a_half_precision_base(tiny_base):
    base = load_base(config.Base(model=str(tiny_base)), torch.bfloat16)
    unet = injected(base)
    assert {p.dtype for p in inject.trainable(unet).values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert next(base.pipe.vae.parameters()).dtype == torch.float32


def test_the_seed_determines_the_start_and_the_global_generator_does_not_change(tiny_base):
    def initial_down(seed):
        torch.manual_seed(5)
        unet = load_base(config.Base(model=str(tiny_base)), torch.float32).pipe.unet
        before = torch.random.get_rng_state()
        inject.inject(unet, "unet", config.Adapter(rank=2), seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return next(inject.adapted_modules({"unet": unet})).tensors["lora_down.weight"]

    assert torch.equal(initial_down(1), initial_down(1))
    assert not torch.equal(initial_down(1), initial_down(2))


def test_scale_is_alpha_over_rank_and_delta_is_the_change_of_the_weights(base):
    unet = injected(base)
    for name, parameter in inject.trainable(unet).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    module = next(inject.adapted_modules({"unet": unet}))
    layer = unet.get_submodule(module.name)
    assert module.scale == 4.0 / 2
    torch.testing.assert_close(module.delta, layer.get_delta_weight(inject.ADAPTER))


def test_disabled_adapters_give_the_base_and_keep_their_gradients(base):
    before = predict(base)
    unet = injected(base, init="orthogonal", rank=4)
    for parameter in inject.trainable(unet).values():
        torch.nn.init.normal_(parameter)
    changed = predict(base)
    with inject.adapters_disabled([unet]):
        assert torch.equal(predict(base), before)
        assert inject.trainable(unet)
    assert torch.equal(predict(base), changed) and not torch.equal(changed, before)


def test_a_new_adapter_has_no_dropout_until_it_is_trained(base):
    assert not any(layer.training for layer in injected(base, dropout=0.5).modules())
