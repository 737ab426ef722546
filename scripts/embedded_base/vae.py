"""Trains the VAE, which maps 64 x 64 pixels to 8 x 8 latents of 4 channels."""

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
    cosine,
    draw_confetti,
    draw_pool,
    photo_crops,
    save_atomically,
    save_half,
    to_pixels,
)
from trainer.embedded import world
from trainer.embedded.score import BASE


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
    """Sets weights for latents of block means of R, G, B and one luminance gradient.

    Decoding is bilinear. Every residual branch starts at zero, so the signal uses only the
    shortcuts. The output norms would remove the colour. Each group therefore contains x, -x and two
    pairs of large constants: GroupNorm becomes a constant factor, and silu(x) - silu(-x) = x undoes
    the activation. Compared with ordinary initialisation this gains 4 dB at equal time.
    """
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif type(module).__name__ == "Attention":
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)

    def carry(conv, kernel, channels) -> None:
        """Makes the first `channels` outputs depend only on the same inputs, through `kernel`."""
        conv.weight[:channels] = 0
        conv.bias[:channels] = 0
        for c in range(channels):
            conv.weight[c, c] = kernel

    def balance(conv, group: int, source: torch.Tensor) -> None:
        """Makes an output group x, -x, constants and unused channels.

        `source` is the kernel [in, h, w] of x.
        """
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


def image_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the L1 loss of pixels and of their differences, which keeps edges sharp."""
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges


def train_vae(work: Path, steps: int, batch_size: int = 16) -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    drawings, _, _ = draw_pool(16_000, POOL_SEED)
    pool = np.concatenate(
        [drawings, np.stack([draw_confetti(rng) for _ in range(4_000)]), photo_crops(4_000, rng)]
    )
    validation, _, _ = draw_pool(64, 0)
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
        pixels = to_pixels(
            pool[np.random.default_rng((SEED, step)).integers(0, len(pool), batch_size)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.sample()
            # The latents of the UNet are inexact, so the decoder learns from noisy ones.
            latents = latents + 0.05 * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
            loss = (
                image_loss(vae.decode(latents).sample.float(), pixels)
                + 1e-6 * posterior.kl().mean()
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            error = decode(vae, encode(vae, to_pixels(validation))) - to_pixels(validation)
            psnr = -10 * math.log10(error.square().mean().item() / 4)
            print(
                f"vae {step} loss {loss.item():.4f} validation {psnr:.2f} dB, "
                f"{time.time() - started:.0f} s",
                flush=True,
            )
            save_atomically(
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                checkpoint,
            )
    whiten(vae, to_pixels(pool[:2048]))
    save_half(vae, BASE / "vae")


@torch.no_grad()
def encode(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Returns mean latents [B, 4, 8, 8], unscaled."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(64)])


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.decode(chunk).sample for chunk in latents.split(64)]).clamp(-1, 1)


@torch.no_grad()
def whiten(vae, pixels: torch.Tensor) -> None:
    """Makes the latent channels uncorrelated, with the mean and deviation that 0.18215 assumes.

    The 1x1 convolutions around the latents are linear, so this changes no decoded image.
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
