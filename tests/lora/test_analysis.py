"""What a finished adapter learned, as numbers for the page."""

import json

import pytest
import torch

from tests.lora.helpers import lora
from trainer.lora import analysis
from trainer.lora.formats.adapted_module import AdaptedModule


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
