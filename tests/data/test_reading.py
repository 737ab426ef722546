"""Captions and prompts are encoded alike in training and samples: clip skip, long captions."""

import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import save_tiny_base
from trainer import config
from trainer.data.examples import encode_texts
from trainer.errors import ModelError
from trainer.families import FAMILIES, load_base
from trainer.families.base import Reading
from trainer.families.latent_diffusion import token_ids
from trainer.inference.samples import Sampler, SampleRequest
from trainer.lora import metadata
from trainer.models.safetensors_header import read_header
from trainer.runs import events, run_folder, run_status
from trainer.training import setup
from trainer.training.step.losses import microbatch_losses

# 170 tokens with the tiny tokenizer, one per letter. The 75th ends a word.
LONG = "stars " * 15 + "moon! " * 19


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    folders = {
        kind: save_tiny_base(tmp_path_factory.mktemp(kind) / "base", kind=kind)
        for kind in ("sd1", "sdxl", "sd3")
    }
    return folders.__getitem__


def load(folder, caption_tokens=75, **base):
    return load_base(config.Base(model=str(folder), **base), torch.float32, caption_tokens)


def test_clip_skip_reads_an_earlier_layer_with_the_final_norm(base_of):
    base = load(base_of("sd1"), clip_skip=2)
    whole = base.pipe.text_encoder
    shorter = CLIPTextModel(CLIPTextConfig(**whole.config.to_dict() | {"num_hidden_layers": 1}))
    shorter.load_state_dict(
        {name: tensor for name, tensor in whole.state_dict().items() if "layers.1." not in name}
    )
    ids = token_ids(base.pipe.tokenizer, ["a red star", ""])
    torch.testing.assert_close(
        base.encode(["a red star", ""])["prompt_embeds"], shorter.eval()(ids)[0]
    )
    plain = load(base_of("sd1")).encode(["a red star"])["prompt_embeds"]
    assert (plain - shorter(ids[:1])[0]).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("sdxl", {"clip_skip": 2}, "does not apply to Stable Diffusion XL"),
        ("sd1", {"clip_skip": 3}, "more than the 2 layers"),
        (
            "sd3",
            {"caption_tokens": 150},
            "caption_tokens = 150 does not apply to Stable Diffusion 3",
        ),
    ],
)
def test_settings_that_a_base_cannot_use_are_refused(base_of, kind, settings, words):
    with pytest.raises(ModelError, match=words):
        load(base_of(kind), **settings)


@pytest.mark.parametrize("chunks", [2, 3])
def test_a_long_caption_is_split_into_chunks_with_start_and_end_tokens(base_of, chunks):
    tokenizer = load(base_of("sd1")).pipe.tokenizer
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = token_ids(tokenizer, [LONG, "", "a"], chunks)
    words = tokenizer(LONG, add_special_tokens=False, truncation=False).input_ids
    assert rows.shape == (3 * chunks, 77)
    assert rows[0, 0] == start
    assert rows[0, -1] == end
    assert rows[0, 1:76].tolist() == words[:75]
    assert rows[1, 1:76].tolist() == words[75:150]
    assert rows[chunks].tolist() == rows[chunks + 1].tolist() == [start] + [end] * 76, (
        "an empty caption, and an empty second chunk"
    )
    assert torch.equal(rows[2 * chunks], token_ids(tokenizer, ["a"])[0])
    assert torch.equal(token_ids(tokenizer, [LONG, "a"], 1)[1], rows[2 * chunks]) and torch.equal(
        token_ids(tokenizer, [LONG])[0], rows[0]
    )


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_embeddings_of_chunks_are_concatenated(base_of, kind):
    """Each chunk is encoded like a prompt. The pooled embedding is the first chunk's."""
    base, plain = load(base_of(kind), caption_tokens=150), load(base_of(kind))
    words = base.pipe.tokenizer(LONG, add_special_tokens=False, truncation=False).input_ids
    pieces = [base.pipe.tokenizer.decode(words[:75]), base.pipe.tokenizer.decode(words[75:150])]
    assert [
        len(base.pipe.tokenizer(piece, add_special_tokens=False).input_ids) for piece in pieces
    ] == [75, 75]
    whole, apart = base.encode([LONG, "a", ""]), plain.encode(pieces)
    assert whole["prompt_embeds"].shape[:2] == (3, 154)
    torch.testing.assert_close(whole["prompt_embeds"][0], torch.cat([*apart["prompt_embeds"]]))
    if kind == "sdxl":
        torch.testing.assert_close(
            whole["pooled_prompt_embeds"][0], apart["pooled_prompt_embeds"][0]
        )
        assert not whole["prompt_embeds"][2].any() and whole["pooled_prompt_embeds"].shape == (
            3,
            24,
        )


@pytest.mark.parametrize(
    "kind, text_rate",
    [("sd1", 0.0), ("sd1", 1e-2), ("sdxl", 0.0)],
    ids=["cached", "trained", "sdxl"],
)
def test_training_reads_the_end_of_a_long_caption(base_of, tiny_run, tmp_path, kind, text_rate):
    """Also if text encoders run in every step, and beside dropped captions in a batch."""
    Image.effect_noise((16, 16), 80).save(tmp_path / "a.png")
    Image.effect_noise((16, 16), 90).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("short")
    losses, warned = {}, {}
    for tokens in (75, 150):
        for tail in ("", " blue"):
            (tmp_path / "a.txt").write_text(LONG[:120] + tail)
            run = tiny_run(
                {
                    "base.model": str(base_of(kind)),
                    "dataset.folder": str(tmp_path),
                    "dataset.caption_tokens": tokens,
                    "dataset.caption_dropout": 0.3,
                    "training.text_encoder_learning_rate": text_rate,
                }
            )
            folder = run_folder.create(run)
            session = setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))
            losses[tokens, tail] = [
                sum(microbatch_losses(session, number)).item() for number in range(6)
            ]
            warnings = run_status.read_status(folder).warnings
            warned[tokens] = [text for text in warnings if "does not see their ends" in text]
    assert losses[75, ""] == losses[75, " blue"]
    assert losses[150, ""] != losses[150, " blue"]
    assert losses[75, ""] != losses[150, ""]
    assert "longer than 75 tokens" in warned[75][0]
    assert not warned[150]


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("sd1", {"base.clip_skip": 2}),
        ("sd1", {"dataset.caption_tokens": 150}),
        ("sdxl", {"dataset.caption_tokens": 225}),
    ],
)
def test_a_run_its_samples_and_a_preview_encode_prompts_alike(
    base_of, train_tiny, tmp_path, kind, settings
):
    changes = {
        "base.model": str(base_of(kind)),
        "training.steps": 1,
        "saving.saves": 1,
        "sampling.prompts": [LONG],
    }
    folder = train_tiny(changes | settings)
    run, samples = config.load(folder / "run.toml"), run_status.read_status(folder).samples
    request = {"inference_steps": 2, "seed": run.sampling.seed, "width": 32, "height": 32}
    alike, plain = str(tmp_path / "alike.png"), str(tmp_path / "plain.png")
    Sampler().render(
        SampleRequest(LONG, alike, run.base, caption_tokens=run.dataset.caption_tokens, **request)
    )
    Sampler().render(SampleRequest(LONG, plain, config.Base(model=run.base.model), **request))
    assert Image.open(alike).tobytes() == Image.open(folder / samples[0].file).tobytes()
    assert Image.open(alike).tobytes() != Image.open(plain).tobytes()
    written = read_header(folder / run_status.read_status(folder).finished.file).metadata
    assert written["ss_clip_skip"] == ("2" if "base.clip_skip" in settings else "None")
    assert written["ss_max_token_length"] == str(settings.get("dataset.caption_tokens", "None"))


def test_settings_saved_in_a_file_contain_no_path_of_a_vae():
    run = config.replace(config.RunConfig(), {"base.vae": "/home/somebody/vae.safetensors"})
    assert "somebody" not in metadata.shared_config(
        run
    ) and "vae.safetensors" in metadata.shared_config(run)


def test_conditioning_is_cached_per_number_format_and_never_if_not_finite(
    base_of,
):
    base = load(base_of("sd1"))
    hashes = {setup.base_hashes(base)[1]}
    base.pipe.text_encoder.to(torch.float16)
    assert len(hashes | {setup.base_hashes(base)[1]}) == 2
    next(base.pipe.text_encoder.parameters()).data.fill_(float("inf"))
    for _ in range(2):
        with pytest.raises(ModelError, match="finite numbers for 'a cat'.*base.precision = fp32"):
            encode_texts(base, ["a cat"], "hash")


def test_conditioning_is_cached_per_clip_skip_and_caption_length(base_of):
    hashes = {
        setup.base_hashes(load(base_of("sd1"), **how))[1]
        for how in ({}, {"clip_skip": 2}, {"caption_tokens": 150})
    }
    assert len(hashes) == 3 and Reading() == load(base_of("sd1")).reading
    assert all(
        hasattr(family, "supports_clip_skip") and hasattr(family, "supports_long_captions")
        for family in FAMILIES.values()
    )
