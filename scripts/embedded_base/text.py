"""Makes the tokenizer, and trains the text encoder on captions alone."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scripts.embedded_base.common import SEED, cosine, save_half
from trainer.embedded import objects, score, world
from trainer.embedded.score import BASE


def learn_merges(words: dict[str, int], count: int) -> list[tuple[str, str]]:
    """Returns byte-pair merges of weighted words, the most frequent pair first.

    Source: Sennrich et al. 2016.
    """
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while len(merges) < count:
        pairs: dict[tuple[str, str], int] = {}
        for word, weight in words.items():
            for pair in pairwise(split[word]):
                pairs[pair] = pairs.get(pair, 0) + weight
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for pieces in split.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def make_tokenizer(folder: Path, captions: list[str]) -> None:
    """Writes a byte-level BPE tokenizer with 2,048 tokens in the file format of CLIP.

    The tokens are 256 bytes, 256 bytes that end a word, merges and two special tokens. The words of
    the captions are merged first, then English words from Python's manual, so that other text
    needs few tokens too.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    manual = Counter(re.findall(r"[a-z]{2,}", " ".join(topics.values()).lower()))
    words = dict(manual.most_common(3000))
    words |= {word: 10**6 for caption in captions for word in re.findall(r"[a-z]{2,}", caption)}
    letters = sorted(ByteLevel.alphabet())
    specials = ["<|startoftext|>", "<|endoftext|>"]
    merges = learn_merges(words, 2048 - 2 * len(letters) - len(specials))
    pieces = (
        letters
        + [letter + "</w>" for letter in letters]
        + ["".join(merge) for merge in merges]
        + specials
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False),
        encoding="utf-8",
    )
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(folder)


def load_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(BASE / "tokenizer")


def token_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    """Returns token ids as int64 [B, 77], padded like the pipeline pads them."""
    return tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def caption_labels(caption: str, scene: world.Scene) -> list[int]:
    """Returns the classes of object, colour, background and style; 0 if the caption omits them."""
    words = set(caption.replace(",", "").split())
    names_background = "background" in caption or any(
        word in words for word in ("on", "in", "with", "at", "by", "under")
    )
    return [
        1 + list(objects.OBJECTS).index(scene.object) if scene.object in words else 0,
        1 + list(world.COLOURS).index(scene.colour) if scene.colour in words else 0,
        1 + score.BACKGROUNDS.index(scene.background) if names_background else 0,
        world.STYLES.index(scene.style),
    ]


def train_text(steps: int, batch_size: int = 64) -> None:
    """Trains the text encoder to classify a caption at its end-of-text token and all padding.

    It comes before the UNet. If both learned together, following prompts would take several times
    longer to learn.
    """
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    scenes = [world.sample_scene(rng) for _ in range(40_000)]
    captions = [world.caption_scene(scene, rng) for scene in scenes]
    make_tokenizer(BASE / "tokenizer", captions[:2000])
    tokenizer = load_tokenizer()
    ids = token_ids(tokenizer, captions)
    labels = torch.tensor([caption_labels(*pair) for pair in zip(captions, scenes, strict=True)])
    text_encoder = new_text_encoder(tokenizer)
    counts = (
        1 + len(objects.OBJECTS),
        1 + len(world.COLOURS),
        1 + len(score.BACKGROUNDS),
        len(world.STYLES),
    )
    head = nn.Linear(128, sum(counts))
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def logits(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text_encoder(chosen).last_hidden_state
        return head(hidden.float()), chosen == tokenizer.eos_token_id

    started = time.time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(step, steps)
        batch = torch.from_numpy(rng.integers(0, len(ids) - 512, batch_size))
        outputs, after_end = logits(ids[batch])
        loss = 0.0
        for output, label in zip(outputs.split(counts, dim=-1), labels[batch].T, strict=True):
            every = F.cross_entropy(
                output.transpose(1, 2), label[:, None].expand(-1, 77), reduction="none"
            )
            loss = loss + (every * after_end).sum() / after_end.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                outputs, _ = logits(ids[-512:])
            answers = [output[:, -1].argmax(-1) for output in outputs.split(counts, dim=-1)]
            right = (torch.stack(answers, dim=1) == labels[-512:]).float().mean(0).tolist()
            print(
                f"text {step} loss {loss.item():.3f} validation {np.round(right, 3)}, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
    save_half(text_encoder, BASE / "text_encoder")
    name_as_published(BASE / "text_encoder/model.safetensors")


def name_as_published(path: Path) -> None:
    """Renames the weights to the names in the file of SD 1.5.

    transformers 5 reads these names, but writes them without `text_model.`.
    """
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    save_file(
        {"text_model." + name.removeprefix("text_model."): value for name, value in state.items()},
        path,
        {"format": "pt"},
    )
