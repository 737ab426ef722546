"""What a finished adapter learned, as numbers for the page."""

import json
import time

import pytest
import torch

from tests.lora.helpers import lora
from trainer.lora import analysis
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import read_adapter


def of_singular_values(values, name="down_blocks.1.attentions.0.to_q", component="unet"):
    draw = torch.Generator().manual_seed(0)
    rank = len(values)
    left, right = (torch.linalg.qr(torch.randn(8, rank, generator=draw))[0] for _ in range(2))
    return lora(name, right.T.contiguous(), left * torch.tensor(values), component=component)


@pytest.mark.parametrize(
    ("squares", "ranks"),
    [
        ([[6.0, 3.0, 1.0]], {"95": 3, "99": 3}),
        ([[99.5, 0.5]], {"95": 1, "99": 1}),
        ([[99.0, 1.0]], {"95": 1, "99": 1}),
        ([[98.99, 1.01]], {"95": 1, "99": 2}),
        ([[95.0, 5.0]], {"95": 1, "99": 2}),
        ([[94.99, 4.01, 1.0]], {"95": 2, "99": 2}),
        ([[50.0, 4.0], [45.0, 1.0]], {"95": 1, "99": 2}),
    ],
)
def test_the_sufficient_rank_keeps_its_share_exactly(squares, ranks):
    assert analysis.sufficient_ranks(squares) == ranks


def test_the_blocks_have_the_norm_of_their_changes():
    modules = [
        of_singular_values([3.0, 4.0]),
        of_singular_values([12.0], name="down_blocks.1.attentions.1.to_q"),
        of_singular_values([2.0], "encoder.layers.2.self_attn.q_proj", "text_encoder_2"),
    ]
    blocks = dict(analysis.analyse(modules)["blocks"])
    assert blocks == {"down 1": pytest.approx(13.0), "text 2 2": pytest.approx(2.0)}


def test_the_spectrum_is_the_share_of_each_rank():
    result = analysis.analyse([of_singular_values([2.0, 1.0]), of_singular_values([1.0])])
    assert result["rank"] == 2
    assert result["spectrum"] == pytest.approx([5 / 6, 1 / 6])
    assert result["modules"][0]["values"] == pytest.approx([2.0, 1.0], rel=1e-3)


def test_a_kind_without_a_plain_pair_has_norms_but_no_ranks():
    tensors = {name: torch.ones(4, 4) for name in ("hada_w1_a", "hada_w1_b")}
    tensors |= {name: torch.ones(4, 4) for name in ("hada_w2_a", "hada_w2_b")}
    module = AdaptedModule("unet", "mid_block.attentions.0.proj_in", "loha", tensors, 1.0)
    result = analysis.analyse([module])
    assert "enough" not in result and result["blocks"] == [["middle", pytest.approx(64.0)]]


def test_the_file_contains_format_and_precision(tmp_path):
    analysis.write(tmp_path, [of_singular_values([1.0])], "kohya", "fp16")
    content = json.loads((tmp_path / "learned.json").read_text())
    assert (content["dialect"], content["precision"]) == ("kohya", "fp16")
    assert content["enough"] == {"95": 1, "99": 1}


def test_the_spectrum_shows_the_rank_that_would_be_enough():
    """The change has the singular values 10, 3, 1 and 0.1."""
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 4, generator=draws))[0] for _ in range(2))
    tensors = {
        "lora_up.weight": left * torch.tensor([10.0, 3.0, 1.0, 0.1]),
        "lora_down.weight": right.T.contiguous(),
    }
    attention = "down_blocks.1.attentions.0.to_q"
    projection = "encoder.layers.2.self_attn.q_proj"
    learned = analysis.analyse(
        [
            AdaptedModule("unet", attention, "lora", tensors, 1.0),
            AdaptedModule("text_encoder", projection, "lora", tensors, 0.5),
        ]
    )
    norm = 110.01**0.5
    assert learned["blocks"] == [
        ["down 1", pytest.approx(norm, rel=1e-4)],
        ["text 2", pytest.approx(norm / 2, rel=1e-4)],
    ]
    module = learned["modules"][0]
    assert module["values"] == pytest.approx([10, 3, 1, 0.1], rel=1e-3)
    assert learned["enough"] == module["enough"] == {"95": 2, "99": 2}
    assert learned["rank"] == 4
    assert sum(learned["spectrum"]) == pytest.approx(1)
    assert learned["spectrum"][0] == pytest.approx(100 / 110.01, rel=1e-3)


@pytest.mark.parametrize(
    "component, name, block",
    [
        ("unet", "mid_block.attentions.0.proj_in", "middle"),
        ("unet", "up_blocks.2.resnets.0.conv1", "up"),
        ("transformer", "transformer_blocks.11.attn.to_q", "block"),
        ("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1", "text 2"),
    ],
)
def test_the_layers_of_every_family_belong_to_a_block(component, name, block):
    assert analysis.block_of(AdaptedModule(component, name, "lora", {}, 1.0))[1] == block


@pytest.fixture
def finished_run(train_tiny):
    changes = {
        "training.text_encoder_learning_rate": 1e-3,
        "adapter.rank": 3,
        "saving.precision": "fp32",
    }
    return train_tiny(changes)


def test_the_page_shows_what_a_finished_run_learned(finished_run):
    from app.views import charts

    view = charts.learned_view()
    blocks = [name for name, norm in view["blocks"] if norm > 0]
    assert blocks == ["down 0", "middle", "up 1", "text 0", "text 1"]
    assert view["rank"] == 3
    assert 1 <= view["enough"]["95"] <= view["enough"]["99"] <= 3
    assert len(view["modules"]) > 10


def test_the_page_makes_a_finished_adapter_smaller(finished_run):
    from app.page.html_view import with_messages
    from app.tabs import train_actions
    from app.views import charts

    shrink = with_messages(train_actions.shrink)
    shrunk = with_messages(train_actions.shrunk)
    job = shrink({"run": finished_run.name, "rank": 1})["job"]
    deadline = time.monotonic() + 200
    answer = shrunk({"job": job})
    while "progress" in answer:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        answer = shrunk({"job": job})
    smaller = read_adapter(finished_run / answer["file"]["name"])
    assert {module.rank for module in smaller.modules} == {1}
    assert "whole number" in shrink({"run": finished_run.name, "rank": 0.5})["error"]

    (finished_run / "learned.json").unlink()
    assert charts.learned_view() == {}
    assert "Library" in shrink({"run": finished_run.name, "rank": 1})["error"]


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_kinds_without_a_spectrum_show_their_change_by_block(train_tiny, kind):
    folder = train_tiny({"adapter.kind": kind, "training.steps": 2, "saving.saves": 1})
    learned = json.loads((folder / "learned.json").read_text())
    assert "enough" not in learned
    assert any(norm > 0 for _, norm in learned["blocks"])
