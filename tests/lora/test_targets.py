"""Which layers get an adapter, of which rank and alpha, and which settings are refused."""

import pytest
import torch

from trainer import config
from trainer.errors import ConfigError
from trainer.families import load_base
from trainer.lora import inject, targets
from trainer.models.safetensors_header import TensorInfo
from trainer.runs import run_folder, run_status
from trainer.training import estimate
from trainer.training.runner import run_in

ATTENTION = "mid_block.attentions.0.transformer_blocks.0"
SHAPES = {
    f"{ATTENTION}.attn1.to_q": (8, 8),
    f"{ATTENTION}.attn1.to_k": (8, 8),
    f"{ATTENTION}.attn2.to_k": (8, 8),
    "up_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
    "up_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    "mid_block.resnets.0.conv2": (8, 8, 3, 3),
}


def names_of(component, part, **settings):
    shapes = inject.weight_shapes(component)
    chosen = targets.choose_targets(config.Adapter(**settings), part, shapes)
    return {target.name for target in chosen}


def test_each_choice_of_layers_contains_the_one_before(tiny_base):
    unet = load_base(config.Base(model=str(tiny_base)), torch.float32).pipe.unet
    names = [names_of(unet, "unet", targets=choice) for choice in targets.DENOISER]
    assert all(smaller < larger for smaller, larger in zip(names, names[1:], strict=False))
    others = set(inject.weight_shapes(unet)) - names[-1]
    assert others == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_all_layers_of_a_text_encoder_can_be_adapted(tiny_base):
    encoder = load_base(config.Base(model=str(tiny_base)), torch.float32).pipe.text_encoder
    names = names_of(encoder, "text_encoder", text_encoder_targets="all")
    assert names == set(inject.weight_shapes(encoder))


def test_ranks_and_alphas_by_name_override_the_other_settings():
    """Otherwise the scale alpha / rank is the same everywhere. Rank 0 leaves a layer out."""
    adapter = config.Adapter(
        targets="linear+conv",
        rank=4,
        alpha=2.0,
        conv_rank=6,
        conv_alpha=9.0,
        ranks="mid_block=8, attn2=0",
        alphas="to_k=7, conv2=1.5",
    )
    chosen = targets.choose_targets(adapter, "unet", SHAPES)
    assert {target.name: (target.rank, target.alpha) for target in chosen} == {
        f"{ATTENTION}.attn1.to_q": (8, 4.0),
        f"{ATTENTION}.attn1.to_k": (8, 7.0),
        "up_blocks.0.attentions.0.proj_in": (4, 2.0),
        "up_blocks.0.resnets.0.conv1": (6, 9.0),
        "mid_block.resnets.0.conv2": (8, 1.5),
    }


def test_a_name_can_be_that_of_a_component():
    adapter = config.Adapter(rank=4, ranks="unet=3")
    chosen = targets.choose_targets(adapter, "unet", SHAPES)
    assert [target.rank for target in chosen] == [3, 3, 3]


def test_only_weights_of_linear_layers_and_convolutions_are_projections():
    names = {
        "a.to_q.weight": (8, 8),
        "a.to_q.bias": (8,),
        "a.norm.weight": (8,),
        "a.conv1.weight": (8, 8, 3, 3),
        "text_model.embeddings.token_embedding.weight": (99, 8),
        "text_projection.weight": (8, 8),
    }
    tensors = {name: TensorInfo("F16", shape) for name, shape in names.items()}
    assert targets.projections(tensors) == {"a.to_q": (8, 8), "a.conv1": (8, 8, 3, 3)}


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(64, 8, (8, 8)), (64, 0, (8, 8)), (96, 0, (8, 12)), (96, 5, (4, 24)), (7, 0, (1, 7))],
)
def test_the_factors_of_a_lokr_are_those_of_peft(size, factor, expected):
    from peft.tuners.lokr.layer import factorization

    assert targets.factorization(size, factor) == expected == factorization(size, factor or -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.target_pattern": "("}, "not a valid regular expression"),
        ({"adapter.target_pattern": "x" * 201}, "200"),
        ({"adapter.ranks": "mid_block:3"}, "mid_block=32"),
        ({"adapter.ranks": "mid_block=3.5"}, "whole numbers"),
        ({"adapter.alphas": "mid_block=0"}, "above 0"),
        (
            {"adapter.kind": "loha", "adapter.dropout": 0.1},
            "adapter.dropout does not exist for loha",
        ),
        ({"adapter.kind": "dora", "adapter.module_dropout": 0.1}, "do not exist for dora"),
        ({"adapter.kind": "lokr", "adapter.init": "pissa"}, "does not exist for lokr"),
        (
            {"adapter.kind": "lokr", "saving.dialects": ["kohya", "peft"]},
            "peft cannot .* adapter.kind = lokr",
        ),
        (
            {"adapter.kind": "loha", "saving.dialects": ["diffusers"]},
            "diffusers cannot .* adapter.kind = loha",
        ),
        ({"adapter.lokr_factor": 4}, "lokr only"),
        ({"base.quantization": "4bit", "adapter.kind": "dora"}, "lora or rslora"),
        (
            {
                "training.text_encoder_until": 0.5,
                "training.learning_rate": 0.0,
                "training.text_encoder_learning_rate": 0.1,
            },
            "nothing to train",
        ),
        ({"adapter.init": "olora", "adapter.module_dropout": 0.1}, "adapter.init"),
        ({"adapter.targets": "linear", "adapter.target_pattern": "a"}, "adapter.target_pattern"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.replace(config.RunConfig(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.target_pattern": "nowhere"}, "matches no module of the unet"),
        ({"adapter.target_pattern": r"(?:(.)|(..)|(...))+\3\3\2\2$"}, "takes too long"),
        ({"adapter.ranks": "nowhere=3"}, "contains nowhere"),
        ({"adapter.ranks": "unet=0"}, "left to train"),
    ],
)
def test_settings_that_select_no_module_are_refused_by_estimate_and_run(tiny_run, changes, message):
    run = tiny_run(changes)
    with pytest.raises(ConfigError, match=message):
        estimate.trainable_parameters(run)
    folder = run_folder.create(run)
    assert run_in(folder) == 1 and message in run_status.read_status(folder).message
