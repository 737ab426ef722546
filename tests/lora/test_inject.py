"""The adapter in a real (tiny) model."""

import pytest
import torch

from trainer import config
from trainer.families import FAMILIES, load_base
from trainer.lora import inject as adapters
from trainer.lora import targets
from trainer.training import estimate

FAMILY = FAMILIES["sd1"]


@pytest.fixture
def base(tiny_base):
    return load_base(config.Base(model=str(tiny_base)), torch.float32)


def inject(base, part="unet", **changes):
    module = getattr(base.pipe, part)
    adapters.inject(module, part, config.Adapter(**({"rank": 2, "alpha": 4.0} | changes)), seed=1)
    return module


def predict(base):
    with torch.no_grad():
        conditioning = FAMILY.encode_prompts(base.pipe, ["a red star"])
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return base.pipe.unet(
            latents, 500, encoder_hidden_states=conditioning["prompt_embeds"]
        ).sample


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(base):
    before = predict(base)
    for part in ("unet", "text_encoder"):
        inject(base, part)
    assert torch.equal(predict(base), before)
    for part in ("unet", "text_encoder"):
        for name, parameter in adapters.trainable(getattr(base.pipe, part)).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(predict(base), before)


def test_every_attention_projection_is_adapted_and_nothing_else(base):
    unet, text = inject(base), inject(base, "text_encoder")
    for module, ends in ((unet, targets.ATTENTION), (text, targets.TEXT_ATTENTION)):
        expected = {
            name.removesuffix(".base_layer")
            for name, layer in module.named_modules()
            if isinstance(layer, torch.nn.Linear)
            and name.removesuffix(".base_layer").endswith(ends)
        }
        assert {m.name for m in adapters.adapted_modules({"x": module})} == expected and len(
            expected
        ) >= 8
        assert all("lora_" in name for name in adapters.trainable(module))


@pytest.mark.parametrize("text_rate", [0.0, 1e-4])
def test_the_parameters_are_those_estimated_before(base, tiny_base, text_rate):
    run = config.replace(
        config.RunConfig(),
        {
            "base.model": str(tiny_base),
            "adapter.rank": 3,
            "training.text_encoder_learning_rate": text_rate,
        },
    )
    parts = ["unet", *(["text_encoder"] if text_rate else [])]
    counted = sum(
        p.numel() for part in parts for p in adapters.trainable(inject(base, part, rank=3)).values()
    )
    assert estimate.trainable_parameters(run) == counted


def test_the_adapter_is_float32_on_a_half_precision_base(tiny_base):
    base = load_base(config.Base(model=str(tiny_base)), torch.bfloat16)
    unet = inject(base)
    assert {p.dtype for p in adapters.trainable(unet).values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert next(base.pipe.vae.parameters()).dtype == torch.float32


def test_the_seed_decides_the_start_and_leaves_the_global_generator_alone(tiny_base):
    def start(seed):
        torch.manual_seed(5)
        base = load_base(config.Base(model=str(tiny_base)), torch.float32)
        before = torch.random.get_rng_state()
        adapters.inject(base.pipe.unet, "unet", config.Adapter(rank=2), seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return next(adapters.adapted_modules({"unet": base.pipe.unet})).tensors["lora_down.weight"]

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_scale_is_alpha_over_rank_and_delta_is_the_difference_of_the_weights(base):
    unet = inject(base)
    for name, parameter in adapters.trainable(unet).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    module = next(adapters.adapted_modules({"unet": unet}))
    layer = unet.get_submodule(module.name)
    assert module.scale == 2.0
    torch.testing.assert_close(module.delta, layer.get_delta_weight(adapters.ADAPTER))


def test_a_fresh_adapter_drops_nothing_out_until_it_is_trained(base):
    assert not any(layer.training for layer in inject(base, dropout=0.5).modules())
