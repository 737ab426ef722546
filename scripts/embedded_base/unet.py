"""Trains the denoiser on latents and caption embeddings that are computed once."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from scripts.embedded_base.common import (
    POOL_SEED,
    SEED,
    draw_pool,
    save_atomically,
    save_half,
    to_pixels,
)
from scripts.embedded_base.text import load_tokenizer, token_ids
from scripts.embedded_base.vae import encode
from trainer.embedded import world
from trainer.embedded.score import BASE


def new_unet():
    """Returns a UNet with the topology of SD 1.5, and so with the same 686 parameter names."""
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
    for module in unet.modules():  # each residual branch starts at zero
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
        elif type(module).__name__ == "Transformer2DModel":
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def new_noise_scheduler():
    """Returns a DDIM scheduler with the noise schedule of SD 1.5."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def make_latent_pool(path: Path, count: int) -> None:
    """Saves latents [count, 4, 8, 8], and embeddings [U, 77, 128] with each image's row in them."""
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
    chunks = token_ids(tokenizer, different).split(128)
    embeds = [text_encoder(chunk).last_hidden_state.bfloat16() for chunk in chunks]
    rows = torch.tensor([row[caption] for caption in captions])
    save_atomically(
        {"latents": torch.cat(latents), "rows": rows, "prompt_embeds": torch.cat(embeds)}, path
    )


def noised_batch(
    pool: dict, alphas_cumprod: torch.Tensor, generator: torch.Generator, batch_size: int
):
    """Returns noisy latents, timesteps, prompt_embeds, noise and loss weights of a random batch.

    Timesteps are stratified: one in each of `batch_size` equal parts of the schedule. One caption
    in ten is empty. The weights are min-SNR with gamma 5 (Hang et al. 2023).
    """
    chosen = torch.randint(len(pool["latents"]), (batch_size,), generator=generator)
    latents = pool["latents"][chosen]
    rows = pool["rows"][chosen] * (torch.rand(batch_size, generator=generator) > 0.1)
    fractions = (
        torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    ) / batch_size
    timesteps = (fractions * len(alphas_cumprod)).long()
    noise = torch.randn(latents.shape, generator=generator)
    alpha = alphas_cumprod[timesteps][:, None, None, None]
    snr = alphas_cumprod[timesteps] / (1 - alphas_cumprod[timesteps])
    noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    return (
        noisy_latents,
        timesteps,
        pool["prompt_embeds"][rows].float(),
        noise,
        snr.clamp(max=5.0) / snr,
    )


def average(tensors: list[torch.Tensor]) -> None:
    """Replaces each tensor by its mean over all processes."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, mean in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(mean.view_as(tensor))


ROUND = 10
"""Steps between two averagings of the weights (local SGD, Stich 2018).

On a busy machine the processes would lose time if they waited for each other in every step.
"""


def unet_worker(rank: int, processes: int, work: Path, minutes: float, batch_size: int) -> None:
    """Trains as one of several processes with one thread each.

    On two cores this is faster than one process with two threads.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{(work / 'rendezvous').resolve()}",
        rank=rank,
        world_size=processes,
    )
    torch.manual_seed(SEED)
    unet = new_unet()
    parameters = list(unet.parameters())
    ema = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
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
        # The schedule follows the clock of rank 0 and not the step, because the duration of a step
        # varies on a busy machine.
        clock = torch.tensor((time.time() - started) / 60)
        torch.distributed.broadcast(clock, 0)
        elapsed = clock.item()
        if rank == 0 and (elapsed >= minutes or rounds % 20 == 0):
            print(
                f"unet {rounds * ROUND} steps, loss {np.mean(losses or [0]):.4f}, "
                f"{elapsed:.1f} of {minutes:g} minutes",
                flush=True,
            )
            losses.clear()
            state = {
                "model": unet.state_dict(),
                "ema": ema,
                "optimizer": optimizer.state_dict(),
                "rounds": rounds,
                "minutes": elapsed,
            }
            save_atomically(state, checkpoint)
        if elapsed >= minutes:
            break
        decay = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * elapsed / minutes))
        for step in range(rounds * ROUND, (rounds + 1) * ROUND):
            optimizer.param_groups[0]["lr"] = 1e-3 * decay * min(1.0, (step + 1) / 200)
            generator = torch.Generator().manual_seed(SEED + step * processes + rank)
            noisy_latents, timesteps, prompt_embeds, noise, weights = noised_batch(
                pool, alphas_cumprod, generator, batch_size
            )
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
    torch.multiprocessing.spawn(
        unet_worker, (processes, work, minutes, batch_size), nprocs=processes
    )
    export_unet(work)


def export_unet(work: Path) -> None:
    """Writes the averaged weights and the other files of the pipeline folder."""
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
