"""Makes the embedded base model from nothing: `python -m trainer.embedded.train_base` runs every stage in order.

    vae        pictures -> 8x8x4 latents and back               -> base/vae
    text       tokenizer, then the text encoder on captions     -> base/tokenizer, base/text_encoder
    unet       the denoiser, on precomputed latents             -> base/unet, base/scheduler, base/model_index.json
    classifier the scorer's own judge of shapes                 -> classifier.safetensors
    examples   the drawn example datasets                       -> examples/subject, examples/style

`train_base.py unet` runs one stage. Each stage keeps its state in the work folder and goes on from there when it is started again.
The result is a Stable Diffusion in SD 1.5's own layout, only smaller; nothing else writes these weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from trainer.embedded import score, world

HERE = Path(__file__).parent
BASE = HERE / "base"
SEED = 20261122
POOL_SEED = 1_000_000
"""First seed of the pictures that the base is trained on; the scorer's prompts and the classifier use others."""


# ---------------------------------------------------------------- shared


def draw_pool(count: int, first_seed: int) -> tuple[np.ndarray, list[str], list[world.Scene]]:
    """uint8 [count, 64, 64, 3], captions, scenes."""
    examples = [world.draw_example(seed) for seed in range(first_seed, first_seed + count)]
    pixels = np.stack([np.asarray(image) for image, _, _ in examples])
    return pixels, [caption for _, caption, _ in examples], [scene for _, _, scene in examples]


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, h, w] in -1 .. 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def save_half(model, folder: Path) -> None:
    """Saves a float16 copy, so that the float32 model can train on."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder)


# ---------------------------------------------------------------- VAE


def new_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=world.PIXELS,
    )


@torch.no_grad()
def start_near_identity(vae) -> None:
    """Sets the weights so that latents are block means of R, G, B plus one luminance gradient, and decoding is bilinear.

    Every residual branch starts at zero, so the signal runs through the shortcuts alone. The output norms would remove
    the colour: a group therefore holds x, -x and two pairs of large constants, which makes GroupNorm a constant factor,
    and silu(x) - silu(-x) = x undoes the activation. Against ordinary initialisation this was worth 4 dB at equal time.
    """
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif type(module).__name__ == "Attention":
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)

    def carry(conv, kernel, channels) -> None:
        """The first `channels` channels pass through `kernel` and nothing else reaches them."""
        conv.weight[:channels] = 0
        conv.bias[:channels] = 0
        for c in range(channels):
            conv.weight[c, c] = kernel

    def balance(conv, group: int, source: torch.Tensor) -> None:
        """Group `group` of the output becomes x, -x, constants and unused channels; `source` is x's kernel [in, h, w]."""
        size = conv.weight.shape[0] // 4
        first = group * size
        conv.weight[first : first + 4] = 0
        conv.bias[first : first + size] = 0
        conv.weight[first], conv.weight[first + 1] = source, -source
        pairs = size // 8 or 1
        for pair in range(pairs):
            at = first + 2 + 2 * pair
            conv.weight[at : at + 2] = 0
            conv.bias[at], conv.bias[at + 1] = 3.0, -3.0

    one, centre = torch.ones(1, 1), torch.zeros(3, 3)
    centre[1, 1] = 1
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 0.25
    encoder, decoder = vae.encoder, vae.decoder

    carry(encoder.conv_in, centre, 3)
    for block in encoder.down_blocks[:2]:
        carry(block.downsamplers[0].conv, mean, 3)
    for block in encoder.down_blocks[1:3]:
        carry(block.resnets[0].conv_shortcut, one, 3)
    last = encoder.down_blocks[2].downsamplers[0].conv
    for group in range(4):
        source = torch.zeros_like(last.weight[0])
        if group < 3:
            source[group] = mean
        else:
            source[:3, 0, 0], source[:3, 1, 1] = 0.5, -0.5
        balance(last, group, source)
    factor = math.sqrt((4 * 9.0) / 16)
    encoder.conv_out.weight.mul_(0.1)
    nn.init.zeros_(encoder.conv_out.bias)
    encoder.conv_out.weight[4:] = 0
    encoder.conv_out.bias[4:] = -6.0
    for c in range(4):
        encoder.conv_out.weight[c, 16 * c : 16 * c + 4] = 0
        encoder.conv_out.weight[c, 16 * c] = factor * centre
        encoder.conv_out.weight[c, 16 * c + 1] = -factor * centre

    for conv, size in ((vae.quant_conv, 8), (vae.post_quant_conv, 4)):
        conv.weight.copy_(torch.eye(size)[:, :, None, None])
        nn.init.zeros_(conv.bias)

    tent = torch.tensor([0.25, 0.5, 0.25])
    carry(decoder.conv_in, centre, 4)
    for block in decoder.up_blocks[:3]:
        carry(block.upsamplers[0].conv, tent[:, None] * tent, 3)
    carry(decoder.up_blocks[2].resnets[0].conv_shortcut, one, 3)
    shortcut = decoder.up_blocks[3].resnets[0].conv_shortcut
    for group in range(3):
        source = torch.zeros_like(shortcut.weight[0])
        source[group] = 1
        balance(shortcut, group, source)
    factor = math.sqrt(2 * 9.0 / 4)
    decoder.conv_out.weight.mul_(0.1)
    nn.init.zeros_(decoder.conv_out.bias)
    for c in range(3):
        decoder.conv_out.weight[c, 4 * c : 4 * c + 4] = 0
        decoder.conv_out.weight[c, 4 * c] = factor * centre
        decoder.conv_out.weight[c, 4 * c + 1] = -factor * centre


def draw_confetti(rng: np.random.Generator) -> np.ndarray:
    """Random polygons, ellipses and lines of random colours: so that the VAE draws what the world does not hold."""
    side = world.PIXELS * 2
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 7)):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        x, y = rng.uniform(0, side, 2)
        w, h = rng.uniform(side / 12, side / 2, 2)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
        elif kind == 1:
            draw.polygon([(x + rng.normal() * w / 2, y + rng.normal() * h / 2) for _ in range(4)], fill=colour)
        else:
            draw.line([(x, y), tuple(rng.uniform(0, side, 2))], fill=colour, width=int(rng.integers(2, 12)))
    return np.asarray(image.resize((world.PIXELS,) * 2, Image.Resampling.BOX))


def photo_crops(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random crops of the example photographs, so that real pictures survive the VAE too."""
    photos = [Image.open(path).convert("RGB") for path in sorted((HERE / "examples/photos").glob("*.jpg"))]
    crops = []
    for i in range(count):
        photo = photos[i % len(photos)]
        size = int(rng.uniform(96, min(photo.size)))
        x, y = (int(rng.integers(0, edge - size + 1)) for edge in photo.size)
        crop = photo.resize((world.PIXELS,) * 2, Image.Resampling.BOX, box=(x, y, x + size, y + size))
        crops.append(np.asarray(crop)[:, :: rng.choice((-1, 1))])
    return np.stack(crops)


def picture_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences, which keeps edges sharp."""
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges


def train_vae(work: Path, steps: int, batch_size: int = 16) -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    drawings, _, _ = draw_pool(16_000, POOL_SEED)
    pool = np.concatenate([drawings, np.stack([draw_confetti(rng) for _ in range(4_000)]), photo_crops(4_000, rng)])
    held_out, _, _ = draw_pool(64, 0)
    vae = new_vae().to(memory_format=torch.channels_last)
    start_near_identity(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    checkpoint, first = work / "vae.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started = time.time()
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = 1.5e-3 * cosine(step, steps)
        pixels = to_pixels(pool[np.random.default_rng((SEED, step)).integers(0, len(pool), batch_size)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.sample()
            # the UNet's latents will be a little off: the decoder learns to bear that
            latents = latents + 0.05 * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
            loss = picture_loss(vae.decode(latents).sample.float(), pixels) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            error = decode(vae, encode(vae, to_pixels(held_out))) - to_pixels(held_out)
            psnr = -10 * math.log10(error.square().mean().item() / 4)
            print(f"vae {step} loss {loss.item():.4f} held-out drawings {psnr:.2f} dB, {time.time() - started:.0f} s", flush=True)
            save_atomically({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint)
    whiten(vae, to_pixels(pool[:2048]))
    save_half(vae, BASE / "vae")


@torch.no_grad()
def encode(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Mean latents [B, 4, 8, 8], unscaled."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(64)])


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.decode(chunk).sample for chunk in latents.split(64)]).clamp(-1, 1)


@torch.no_grad()
def whiten(vae, pixels: torch.Tensor) -> None:
    """Makes the latents' channels uncorrelated, of mean 0 and of the standard deviation that SD 1.5's 0.18215 assumes.

    The 1x1 convolutions around the latents are linear, so this changes no decoded picture.
    """
    latents = encode(vae, pixels).permute(1, 0, 2, 3).flatten(1)
    mean = latents.mean(1)
    values, vectors = torch.linalg.eigh(latents.cov())
    whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T / vae.config.scaling_factor
    weight, bias = vae.quant_conv.weight[:, :, 0, 0], vae.quant_conv.bias
    bias[:4] = whitening @ (bias[:4] - mean)
    weight[:4] = whitening @ weight[:4]
    bias[4:] += 2 * whitening.norm(dim=1).log()
    inverse = torch.linalg.inv(whitening)
    weight, bias = vae.post_quant_conv.weight[:, :, 0, 0], vae.post_quant_conv.bias
    bias += weight @ mean
    weight.copy_(weight @ inverse)


# ---------------------------------------------------------------- text


def learn_merges(words: dict[str, int], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (Sennrich et al. 2016), over words with their weights."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while len(merges) < count:
        pairs: dict[tuple[str, str], int] = {}
        for word, weight in words.items():
            for pair in zip(split[word], split[word][1:]):
                pairs[pair] = pairs.get(pair, 0) + weight
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, pieces in split.items():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def make_tokenizer(folder: Path, captions: list[str]) -> None:
    """A byte-level BPE in CLIP's own files: 256 bytes, 256 bytes that end a word, merges, two specials; 2,048 in all.

    The captions' words come first; the rest is English from Python's own manual, so that other text stays short too.
    """
    import re
    from collections import Counter
    from pydoc_data.topics import topics

    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    manual = Counter(re.findall(r"[a-z]{2,}", " ".join(topics.values()).lower()))
    words = dict(manual.most_common(3000))
    words |= {word: 10**6 for caption in captions for word in re.findall(r"[a-z]{2,}", caption)}
    letters = sorted(ByteLevel.alphabet())
    specials = ["<|startoftext|>", "<|endoftext|>"]
    merges = learn_merges(words, 2048 - 2 * len(letters) - len(specials))
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges] + specials
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)


def load_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(BASE / "tokenizer")


def token_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    """int64 [B, 77], padded as the pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


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


def facts(caption: str, scene: world.Scene) -> list[int]:
    """What the caption says of object, colour, background, style; class 0 where it says nothing."""
    words = set(caption.replace(",", "").split())
    names_background = "background" in caption or any(word in words for word in ("on", "in", "with", "at", "by", "under"))
    return [
        1 + list(world.OBJECTS).index(scene.object) if scene.object in words else 0,
        1 + list(world.COLOURS).index(scene.colour) if scene.colour in words else 0,
        1 + score.BACKGROUNDS.index(scene.background) if names_background else 0,
        world.STYLES.index(scene.style),
    ]


def train_text(work: Path, steps: int, batch_size: int = 64) -> None:
    """Trains the text encoder to state the facts of a caption from the end-of-text token and from every padding after it.

    Done before the UNet: one that learns to draw and to read at once takes several times longer to follow prompts.
    """
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    scenes = [world.sample_scene(rng) for _ in range(40_000)]
    captions = [world.caption_scene(scene, rng) for scene in scenes]
    make_tokenizer(BASE / "tokenizer", captions[:2000])
    tokenizer = load_tokenizer()
    ids = token_ids(tokenizer, captions)
    labels = torch.tensor([facts(*pair) for pair in zip(captions, scenes)])
    text_encoder = new_text_encoder(tokenizer)
    counts = (1 + len(world.OBJECTS), 1 + len(world.COLOURS), 1 + len(score.BACKGROUNDS), len(world.STYLES))
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
        for output, label in zip(outputs.split(counts, dim=-1), labels[batch].T):
            every = F.cross_entropy(output.transpose(1, 2), label[:, None].expand(-1, 77), reduction="none")
            loss = loss + (every * after_end).sum() / after_end.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                outputs, _ = logits(ids[-512:])
            right = [(o[:, -1].argmax(-1) == l).float().mean().item() for o, l in zip(outputs.split(counts, dim=-1), labels[-512:].T)]
            print(f"text {step} loss {loss.item():.3f} held-out", *(f"{share:.3f}" for share in right), f"{time.time() - started:.0f} s", flush=True)
    save_half(text_encoder, BASE / "text_encoder")
    name_as_published(BASE / "text_encoder/model.safetensors")


def name_as_published(path: Path) -> None:
    """Gives the weights the names that SD 1.5's file has; transformers 5 reads those but writes them without `text_model.`."""
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    save_file({"text_model." + name.removeprefix("text_model."): value for name, value in state.items()}, path, {"format": "pt"})


# ---------------------------------------------------------------- UNet


def new_unet():
    """SD 1.5's topology, so its 686 parameter names too."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=world.PIXELS // 8,
        block_out_channels=(64, 72, 80, 80),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    for module in unet.modules():  # each residual branch starts silent
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
        elif type(module).__name__ == "Transformer2DModel":
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def new_noise_scheduler():
    """SD 1.5's training schedule; sampling by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


@torch.no_grad()
def make_latent_pool(path: Path, count: int) -> None:
    """Latents [count, 4, 8, 8], each picture's caption row, and the embedding of each different caption [U, 77, 128]."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(BASE / "vae").float()
    latents, captions = [], []
    for first in range(0, count, 2000):
        pictures, texts, _ = draw_pool(2000, POOL_SEED + first)
        latents.append(encode(vae, to_pixels(pictures)) * vae.config.scaling_factor)
        captions += texts
    text_encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder").float()
    tokenizer = load_tokenizer()
    different = ["", *sorted(set(captions))]
    row = {caption: i for i, caption in enumerate(different)}
    embeds = [text_encoder(token_ids(tokenizer, different[i : i + 128])).last_hidden_state.bfloat16() for i in range(0, len(different), 128)]
    rows = torch.tensor([row[caption] for caption in captions])
    save_atomically({"latents": torch.cat(latents), "rows": rows, "prompt_embeds": torch.cat(embeds)}, path)


def noised_batch(pool: dict, alphas_cumprod: torch.Tensor, generator: torch.Generator, batch_size: int):
    """noisy_latents, timesteps, prompt_embeds, noise and loss weights of a random batch.

    Timesteps are stratified: one in each of `batch_size` equal parts of the schedule. One caption in ten is empty.
    The weights are min-SNR with gamma 5 (Hang et al. 2023).
    """
    chosen = torch.randint(len(pool["latents"]), (batch_size,), generator=generator)
    latents = pool["latents"][chosen]
    rows = pool["rows"][chosen] * (torch.rand(batch_size, generator=generator) > 0.1)
    places = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    timesteps = (places * len(alphas_cumprod)).long()
    noise = torch.randn(latents.shape, generator=generator)
    alpha = alphas_cumprod[timesteps][:, None, None, None]
    snr = alphas_cumprod[timesteps] / (1 - alphas_cumprod[timesteps])
    noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    return noisy_latents, timesteps, pool["prompt_embeds"][rows].float(), noise, snr.clamp(max=5.0) / snr


def average(tensors: list[torch.Tensor]) -> None:
    """Replaces the tensors by their mean over all processes."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


ROUND = 10
"""Steps between two averagings of the weights (local SGD, Stich 2018): on a shared machine the processes need not wait every step."""


def unet_worker(rank: int, processes: int, work: Path, minutes: float, batch_size: int) -> None:
    """One of several processes of one thread each: on two cores that beats one process with two threads."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{(work / 'rendezvous').resolve()}", rank=rank, world_size=processes)
    torch.manual_seed(SEED)
    unet = new_unet()
    parameters = list(unet.parameters())
    ema = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint, rounds, spent = work / "unet.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, rounds, spent = state["ema"], state["rounds"], state["minutes"]
    pool = torch.load(work / "pool.pt", mmap=True)
    alphas_cumprod = new_noise_scheduler().alphas_cumprod
    started, losses = time.time() - 60 * spent, []
    while True:
        # the schedule follows rank 0's clock, not the step, because other work on the machine makes steps longer
        clock = torch.tensor((time.time() - started) / 60)
        torch.distributed.broadcast(clock, 0)
        elapsed = clock.item()
        if rank == 0 and (elapsed >= minutes or rounds % 20 == 0):
            print(f"unet {rounds * ROUND} steps, loss {np.mean(losses or [0]):.4f}, {elapsed:.1f} of {minutes:g} minutes", flush=True)
            losses.clear()
            state = {"model": unet.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "rounds": rounds, "minutes": elapsed}
            save_atomically(state, checkpoint)
        if elapsed >= minutes:
            break
        decay = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * elapsed / minutes))
        for step in range(rounds * ROUND, (rounds + 1) * ROUND):
            optimizer.param_groups[0]["lr"] = 1e-3 * decay * min(1.0, (step + 1) / 200)
            generator = torch.Generator().manual_seed(SEED + step * processes + rank)
            noisy_latents, timesteps, prompt_embeds, noise, weights = noised_batch(pool, alphas_cumprod, generator, batch_size)
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds).sample
            loss = (weights * (model_pred - noise).square().mean((1, 2, 3))).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
        rounds += 1
        with torch.no_grad():
            average(parameters)
            if rank == 0:
                for name, value in unet.state_dict().items():
                    ema[name].lerp_(value, 1 - min(0.98, rounds / (rounds + 3)))
    torch.distributed.destroy_process_group()


def train_unet(work: Path, minutes: float, batch_size: int = 32, processes: int = 2) -> None:
    if not (work / "pool.pt").exists():
        make_latent_pool(work / "pool.pt", 40_000)
    (work / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(unet_worker, (processes, work, minutes, batch_size), nprocs=processes)
    export_unet(work)


def export_unet(work: Path) -> None:
    """Writes the averaged weights so far and what makes the folder a pipeline."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel

    unet = new_unet()
    unet.load_state_dict(torch.load(work / "unet.pt")["ema"])
    save_half(unet, BASE / "unet")
    noise_scheduler = new_noise_scheduler()
    noise_scheduler.save_pretrained(BASE / "scheduler")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(BASE / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(BASE / "text_encoder"),
        tokenizer=load_tokenizer(),
        unet=unet,
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_config(BASE)


# ---------------------------------------------------------------- the scorer's classifier


def blob(rng: np.random.Generator) -> Image.Image:
    """What an undertrained base draws: a wobbly shape that is nothing in particular."""
    names = list(world.COLOURS)
    colour, background = rng.choice(names, 2, replace=False)
    waves = rng.normal(0, 0.12, (2, 5))

    def radius(angle: float) -> float:
        return 0.75 + sum(waves[0, k] * math.cos((k + 1) * angle) + waves[1, k] * math.sin((k + 1) * angle) for k in range(5))

    side = world.PIXELS * 2
    image = world.draw_background(str(background), side)
    centre = tuple(rng.uniform(0.4, 0.6, 2))
    pen = world.Pen(side, centre, rng.uniform(0.25, 0.4), world.COLOURS[str(colour)], lines_only=bool(rng.random() < 0.3))
    pen.part(world.polar(radius))
    if rng.random() < 0.5:
        pen.part(world.ellipse(*rng.uniform(-0.3, 0.3, 2), rng.uniform(0.1, 0.4)), world.COLOURS[str(rng.choice(names))])
    image.paste(pen.layer, mask=pen.layer.getchannel("A"))
    return image.resize((world.PIXELS,) * 2, Image.Resampling.BOX)


def draw_labelled(seed: int) -> tuple[np.ndarray, int]:
    """One picture for the classifier and its label."""
    rng = np.random.default_rng(seed)
    kind = rng.random()
    if kind < 0.08:
        return np.asarray(world.draw_subject(str(rng.choice(score.BACKGROUNDS)), seed)), score.LABELS.index("zorbit")
    if kind < 0.11:
        return draw_confetti(rng), score.LABELS.index("nothing")
    if kind < 0.2:
        return np.asarray(blob(rng)), score.LABELS.index("nothing")
    image, _, scene = world.draw_example(seed)
    return np.asarray(image), score.LABELS.index(scene.object)


def degrade(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, noise, fading and a shift: the classifier must see through what the base does to edges and colours."""
    def pick(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    size = int(pick(18, 64))
    pixels = F.interpolate(F.interpolate(pixels, size=size, mode="area"), size=world.PIXELS, mode="bilinear")
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    pixels = torch.roll(pixels, shift, (2, 3)) * pick(0.7, 1.05)
    return pixels + pick(0, 0.15) * torch.randn(pixels.shape, generator=generator)


def train_classifier(steps: int = 1500, batch_size: int = 64) -> None:
    """Trained on drawings that neither the base nor the scorer's prompts use."""
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    pictures, labels = zip(*(draw_labelled(seed) for seed in range(5_000_000, 5_020_000)))
    pictures, labels = np.stack(pictures), torch.tensor(labels)
    classifier = score.new_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps)
        chosen = torch.randint(len(pictures) - 1000, (batch_size,), generator=generator)
        pixels = degrade(to_pixels(pictures[chosen.numpy()]), generator)
        loss = F.cross_entropy(classifier(pixels), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            classifier.eval()
            with torch.no_grad():
                right = (classifier(to_pixels(pictures[-1000:])).argmax(-1) == labels[-1000:]).float().mean().item()
            classifier.train()
            print(f"classifier {step} loss {loss.item():.3f} held-out {right:.3f}", flush=True)
    state = {name: value.half() for name, value in classifier.state_dict().items() if value.is_floating_point()}
    save_file(state, HERE / "classifier.safetensors")


# ---------------------------------------------------------------- example datasets

EXAMPLE_PIXELS = 256
SUBJECT_BACKGROUNDS = ("white", "blue", "pink", "yellow", "purple", "black", "orange", "red", "white", "blue", "brown", "pink")
STYLE_OBJECTS = ("circle", "star", "heart", "moon", "ring", "house", "tree", "flower", "fish", "mushroom", "cat", "face")


def make_examples() -> None:
    """The drawn datasets, larger than the base draws so that a gallery shows something; the trainer resizes them."""
    for name in ("subject", "style"):
        (HERE / "examples" / name).mkdir(parents=True, exist_ok=True)
    for i, background in enumerate(SUBJECT_BACKGROUNDS):
        path = HERE / "examples/subject" / f"zorbit-{i + 1:02d}.png"
        world.draw_subject(background, seed=i, pixels=EXAMPLE_PIXELS).save(path, optimize=True)
        ground = f"{world.article(background)} {background} background"
        path.with_suffix(".txt").write_text(f"a zorbit on {ground}\n")
    for i, thing in enumerate(STYLE_OBJECTS):
        path = HERE / "examples/style" / f"blueprint-{i + 1:02d}-{thing}.png"
        world.draw_blueprint(thing, seed=i, pixels=EXAMPLE_PIXELS).save(path, optimize=True)
        path.with_suffix(".txt").write_text(f"a {thing}, blueprint\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("outputs/base"), help="checkpoints and caches; may be deleted afterwards")
    parser.add_argument("--minutes", type=float, default=80, help="how long the UNet trains")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "vae": lambda: train_vae(args.work, 1450),
        "text": lambda: train_text(args.work, 800),
        "unet": lambda: train_unet(args.work, args.minutes),
        "classifier": train_classifier,
        "examples": make_examples,
        "export": lambda: export_unet(args.work),
    }
    for stage in args.stages or stages:
        stages[stage]()


if __name__ == "__main__":
    main()
