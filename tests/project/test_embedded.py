"""The embedded base loads like SD 1.5, has its layout, and draws what its model card claims."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from trainer.embedded import score, world

EXAMPLES = score.HERE / "examples"


@pytest.fixture(scope="module")
def pipe():
    return score.load_base()


def test_the_base_has_the_layout_of_sd15(pipe):
    names = list(pipe.unet.state_dict())
    assert len(names) == 686
    assert "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight" in names
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.vae_scale_factor == 8
    assert pipe.vae.config.scaling_factor == 0.18215
    assert pipe.safety_checker is None


def test_the_base_has_less_than_16_megabytes():
    files = [path for path in score.BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16_000_000


def test_all_weights_are_finite(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert all(value.isfinite().all() for value in part.state_dict().values())


def test_the_latents_have_unit_variance(pipe):
    """Every trainer assumes this after it has multiplied latents by 0.18215."""
    import torch

    images = np.stack([np.asarray(world.draw_example(seed)[0]) for seed in range(64)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    assert latents.shape == (64, 4, 8, 8)
    assert 0.8 < latents.std() < 1.2


@pytest.mark.parametrize(
    "text",
    [
        "a red star on a white background",
        "",
        "zorbit",
        "Ünïcödé 漢字 🙂 foo_bar(1.2)\n\ttab",
        "x" * 500,
        "\x00\ufffd",
    ],
)
def test_any_text_becomes_77_tokens(pipe, text):
    tokenizer = pipe.tokenizer
    ids = tokenizer(
        text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    ).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert max(ids) < pipe.text_encoder.config.vocab_size
    if len(text) < 70 and text.isprintable():
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_the_same_seed_draws_the_same_image():
    for seed in (0, 1, 12345):
        (image, caption, scene), (again, *rest) = world.draw_example(seed), world.draw_example(seed)
        assert np.array_equal(image, again) and (caption, scene) == tuple(rest)
    assert world.draw_example(0)[1] != world.draw_example(1)[1]
    assert not np.array_equal(world.draw_subject("blue", 0), world.draw_subject("blue", 1))


def test_drawing_does_not_import_torch():
    check = (
        "import sys; from trainer.embedded import world, score; "
        "world.draw_example(0); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=score.HERE.parents[1]).returncode == 0


def test_the_scorer_agrees_with_true_drawings():
    _, scenes = zip(*score.fixed_prompts(100), strict=True)
    true = score.judge([world.draw_scene(scene) for scene in scenes], scenes)
    assert min(true.background, true.colour, true.object) >= 0.97, true


def test_the_scorer_rejects_wrong_drawings():
    _, scenes = zip(*score.fixed_prompts(100), strict=True)
    wrong = score.judge([world.draw_scene(scene) for scene in scenes[1:] + scenes[:1]], scenes)
    assert max(wrong.background, wrong.colour, wrong.object) <= 0.35, wrong
    grey = [Image.new("RGB", (64, 64), (128, 128, 128))] * 10
    assert score.judge(grey, scenes[:10]).object == 0
    assert score.subject_similarity(grey) == score.style_similarity(grey) == 0


def test_similarity_separates_the_examples_from_other_drawings():
    subject = [Image.open(path) for path in sorted((EXAMPLES / "subject").glob("*.png"))]
    style = [Image.open(path) for path in sorted((EXAMPLES / "style").glob("*.png"))]
    ordinary = [world.draw_example(seed)[0] for seed in range(100)]
    assert score.subject_similarity(subject) >= 0.9 and score.style_similarity(style) >= 0.9
    for others in (ordinary, style):
        assert score.subject_similarity(others) <= 0.05
    for others in (ordinary, subject):
        assert score.style_similarity(others) <= 0.05


@pytest.mark.parametrize(
    ("name", "word"), [("subject", "zorbit"), ("style", "blueprint"), ("photos", "photo")]
)
def test_example_datasets_are_complete(name, word):
    images = [
        path for path in sorted((EXAMPLES / name).iterdir()) if path.suffix in (".png", ".jpg")
    ]
    assert len(images) == 12
    for path in images:
        assert word in path.with_suffix(".txt").read_text()
        with Image.open(path) as image:
            image.load()
            assert min(image.size) >= 256


def test_the_photographs_may_be_redistributed():
    licences = (EXAMPLES / "photos/LICENSE.txt").read_text()
    assert all(path.name in licences for path in (EXAMPLES / "photos").glob("*.jpg"))
    assert sum(path.stat().st_size for path in (EXAMPLES / "photos").iterdir()) <= 1_500_000


def test_training_captions_of_the_base_do_not_name_the_examples():
    captions = " ".join(world.draw_example(seed)[1] for seed in range(2000))
    assert score.TRIGGER not in captions and "blueprint" not in captions


FLOOR = score.Score(background=0.95, colour=0.85, object=0.85)
"""Slightly below the table of the model card, because 32 prompts vary more than its 200."""


def test_scores_reach_the_claims_of_the_model_card(pipe):
    reached = score.score_prompts(pipe, count=32, steps=15)
    assert reached.background >= FLOOR.background, reached
    assert reached.colour >= FLOOR.colour, reached
    assert reached.object >= FLOOR.object, reached
