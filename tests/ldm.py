"""Tiny and full-size models in Stability's single-file layout.

The names and shapes follow Stability's model code (openaimodel.py, model.py, mmdit.py) and
OpenCLIP's transformer.py. Nothing comes from the program or from diffusers, so both are tested
against it. `write_single_file` fills the shapes with random numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, out: int, into: int, side: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into, side, side)
    yield f"{name}.bias", (out,)


def linear(
    name: str, out: int, into: int, bias: bool = True
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def unet_resnet(name: str, into: int, out: int, time: int) -> Shapes:
    shapes: Shapes = dict(norm(f"{name}.in_layers.0", into))
    shapes.update(conv(f"{name}.in_layers.2", out, into))
    shapes.update(linear(f"{name}.emb_layers.1", out, time))
    shapes.update(norm(f"{name}.out_layers.0", out))
    shapes.update(conv(f"{name}.out_layers.3", out, out))
    if into != out:
        shapes.update(conv(f"{name}.skip_connection", out, into, 1))
    return shapes


def unet_transformer(name: str, width: int, depth: int, context: int, linear_proj: bool) -> Shapes:
    shapes: Shapes = dict(norm(f"{name}.norm", width))
    for projection in (f"{name}.proj_in", f"{name}.proj_out"):
        shapes.update(
            linear(projection, width, width) if linear_proj else conv(projection, width, width, 1)
        )
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, source in (("attn1", width), ("attn2", context)):
            shapes.update(linear(f"{block}.{attention}.to_q", width, width, bias=False))
            shapes.update(linear(f"{block}.{attention}.to_k", width, source, bias=False))
            shapes.update(linear(f"{block}.{attention}.to_v", width, source, bias=False))
            shapes.update(linear(f"{block}.{attention}.to_out.0", width, width))
        shapes.update(linear(f"{block}.ff.net.0.proj", 8 * width, width))
        shapes.update(linear(f"{block}.ff.net.2", width, 4 * width))
        for layer in (1, 2, 3):
            shapes.update(norm(f"{block}.norm{layer}", width))
    return shapes


def unet(
    width=32,
    multiples=(1, 2),
    res_blocks=1,
    depths=(1, 0),
    context=32,
    linear_proj=False,
    label=0,
    channels=4,
) -> Shapes:
    """Returns the shapes of a UNet.

    A level has `width` times its multiple channels, `res_blocks` layers, and transformers of its
    depth. `label` is the width of the size embedding, or 0.
    """
    time, levels = 4 * width, list(enumerate(multiples))
    shapes: Shapes = {}

    def transformer(name: str, channels: int, depth: int) -> None:
        if depth:
            shapes.update(unet_transformer(name, channels, depth, context, linear_proj))

    shapes.update([*linear("time_embed.0", time, width), *linear("time_embed.2", time, time)])
    if label:
        shapes.update([*linear("label_emb.0.0", time, label), *linear("label_emb.0.2", time, time)])
    shapes.update(conv("input_blocks.0.0", width, channels))

    # Down: every input block's output is also an input of an output block.
    number, now, skips = 1, width, [width]
    for level, multiple in levels:
        for _ in range(res_blocks):
            shapes.update(unet_resnet(f"input_blocks.{number}.0", now, width * multiple, time))
            now = width * multiple
            transformer(f"input_blocks.{number}.1", now, depths[level])
            skips.append(now)
            number += 1
        if level < len(multiples) - 1:
            shapes.update(conv(f"input_blocks.{number}.0.op", now, now))
            skips.append(now)
            number += 1

    shapes.update(unet_resnet("middle_block.0", now, now, time))
    transformer("middle_block.1", now, max(1, depths[-1]))
    shapes.update(unet_resnet("middle_block.2", now, now, time))

    # Up
    number = 0
    for level, multiple in reversed(levels):
        for layer in range(res_blocks + 1):
            out = width * multiple
            shapes.update(unet_resnet(f"output_blocks.{number}.0", now + skips.pop(), out, time))
            now = out
            transformer(f"output_blocks.{number}.1", now, depths[level])
            if level and layer == res_blocks:
                slot = 2 if depths[level] else 1
                shapes.update(conv(f"output_blocks.{number}.{slot}.conv", now, now))
            number += 1
    shapes.update([*norm("out.0", width), *conv("out.2", 4, width)])
    return shapes


def vae(width=32, multiples=(1, 2), res_blocks=1, latents=4) -> Shapes:
    shapes: Shapes = {}

    def resnet(name, into, out):
        shapes.update([*norm(f"{name}.norm1", into), *conv(f"{name}.conv1", out, into)])
        shapes.update([*norm(f"{name}.norm2", out), *conv(f"{name}.conv2", out, out)])
        if into != out:
            shapes.update(conv(f"{name}.nin_shortcut", out, into, 1))

    def middle(name, c):
        resnet(f"{name}.block_1", c, c)
        shapes.update(norm(f"{name}.attn_1.norm", c))
        for projection in ("q", "k", "v", "proj_out"):
            shapes.update(conv(f"{name}.attn_1.{projection}", c, c, 1))
        resnet(f"{name}.block_2", c, c)

    top, last = width * multiples[-1], len(multiples) - 1
    shapes.update(conv("encoder.conv_in", width, 3))
    now = width
    for level, multiple in enumerate(multiples):
        for i in range(res_blocks):
            resnet(f"encoder.down.{level}.block.{i}", now, width * multiple)
            now = width * multiple
        if level < last:
            shapes.update(conv(f"encoder.down.{level}.downsample.conv", now, now))
    middle("encoder.mid", top)
    shapes.update([*norm("encoder.norm_out", top), *conv("encoder.conv_out", 2 * latents, top)])
    shapes.update(
        [
            *conv("quant_conv", 2 * latents, 2 * latents, 1),
            *conv("post_quant_conv", latents, latents, 1),
        ]
    )
    shapes.update(conv("decoder.conv_in", top, latents))
    middle("decoder.mid", top)
    now = top
    for level, multiple in reversed(list(enumerate(multiples))):
        for i in range(res_blocks + 1):
            resnet(f"decoder.up.{level}.block.{i}", now, width * multiple)
            now = width * multiple
        if level:
            shapes.update(conv(f"decoder.up.{level}.upsample.conv", now, now))
    shapes.update([*norm("decoder.norm_out", width), *conv("decoder.conv_out", 3, width)])
    return shapes


def clip(width=32, layers=2, inner=48) -> Shapes:
    """Returns the shapes of OpenAI's text encoder, under transformers' names."""
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for n in range(layers):
        layer = f"text_model.encoder.layers.{n}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.update(linear(f"{layer}.self_attn.{projection}", width, width))
        shapes.update([*norm(f"{layer}.layer_norm1", width), *norm(f"{layer}.layer_norm2", width)])
        shapes.update(
            [*linear(f"{layer}.mlp.fc1", inner, width), *linear(f"{layer}.mlp.fc2", width, inner)]
        )
    shapes.update(norm("text_model.final_layer_norm", width))
    return shapes


def open_clip(width=48, layers=2, inner=64) -> Shapes:
    """Returns the shapes of OpenCLIP's text encoder, under its own names."""
    shapes: Shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (1,),
    }
    for n in range(layers):
        block = f"transformer.resblocks.{n}"
        shapes.update(
            {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
            }
        )
        shapes.update(
            [
                *linear(f"{block}.attn.out_proj", width, width),
                *norm(f"{block}.ln_1", width),
                *norm(f"{block}.ln_2", width),
            ]
        )
        shapes.update(
            [
                *linear(f"{block}.mlp.c_fc", inner, width),
                *linear(f"{block}.mlp.c_proj", width, inner),
            ]
        )
    shapes.update(norm("ln_final", width))
    return shapes


def mmdit(width=64, layers=2, context=80, pooled=96, side=8, qk_norm=False, second=()) -> Shapes:
    """Returns the shapes of the transformer of Stable Diffusion 3.

    Its last block discards the text, so it has no text output and MLP. `second` contains the
    numbers of the blocks with a second attention over the image.
    """
    shapes: Shapes = {"pos_embed": (1, side * side, width)}
    shapes.update(
        [*conv("x_embedder.proj", width, 16, 2), *linear("context_embedder", width, context)]
    )
    shapes.update(
        [*linear("t_embedder.mlp.0", width, 256), *linear("t_embedder.mlp.2", width, width)]
    )
    shapes.update(
        [*linear("y_embedder.mlp.0", width, pooled), *linear("y_embedder.mlp.2", width, width)]
    )
    for n in range(layers):
        for stream in ("x_block", "context_block"):
            block, last = (
                f"joint_blocks.{n}.{stream}",
                stream == "context_block" and n == layers - 1,
            )
            attentions = ["attn", *(["attn2"] if stream == "x_block" and n in second else [])]
            for attention in attentions:
                shapes.update(linear(f"{block}.{attention}.qkv", 3 * width, width))
                if qk_norm:
                    shapes.update({f"{block}.{attention}.ln_{x}.weight": (64,) for x in "qk"})
                if not last:
                    shapes.update(linear(f"{block}.{attention}.proj", width, width))
            shapes.update(
                linear(
                    f"{block}.adaLN_modulation.1",
                    (2 if last else 3 + 3 * len(attentions)) * width,
                    width,
                )
            )
            if not last:
                shapes.update(
                    [
                        *linear(f"{block}.mlp.fc1", 4 * width, width),
                        *linear(f"{block}.mlp.fc2", width, 4 * width),
                    ]
                )
    shapes.update(
        [
            *linear("final_layer.linear", 64, width),
            *linear("final_layer.adaLN_modulation.1", 2 * width, width),
        ]
    )
    return shapes


def whole(parts: dict[str, Shapes]) -> Shapes:
    """Returns the shapes of a whole file from those of its parts by prefix."""
    joined: Shapes = {}
    for prefix, shapes in parts.items():
        joined |= {prefix + name: shape for name, shape in shapes.items()}
    return joined


CLIP_L, CLIP_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."


def sd3(**denoiser: Any) -> dict[str, Shapes]:
    """Returns the shapes of the edition with both CLIP encoders, by prefix.

    Its VAE has no convolutions around the latents.
    """
    plain_vae = {name: shape for name, shape in vae(latents=16).items() if "quant_conv" not in name}
    first = clip(32) | {"text_projection.weight": (32, 32)}
    return {
        UNET: mmdit(**denoiser),
        VAE: plain_vae,
        CLIP_L: first,
        CLIP_G: clip(64) | {"text_projection.weight": (64, 64)},
    }


UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD1, SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_1, XL_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
TINY = {
    "sd1": {UNET: unet(), VAE: vae(), SD1: clip()},
    "sd2": {UNET: unet(linear_proj=True, context=48), VAE: vae(), SD2: open_clip(layers=3)},
    "sdxl": {
        UNET: unet(res_blocks=2, depths=(0, 2), context=80, linear_proj=True, label=48 + 6 * 256),
        VAE: vae(),
        XL_1: clip(),
        XL_2: open_clip(),
    },
    "sd3": sd3(),
    "sd35m": sd3(qk_norm=True, second=(0,)),
    "sd35l": sd3(qk_norm=True),
}
FULL_VAE = vae(128, (1, 2, 4, 4), 2)
FULL = {
    "sd15": {
        UNET: unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 768),
        VAE: FULL_VAE,
        SD1: clip(768, 12, 3072),
    },
    "sd21": {
        UNET: unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1024, linear_proj=True),
        VAE: FULL_VAE,
        SD2: open_clip(1024, 24, 4096),
    },
    "sdxl": {
        UNET: unet(320, (1, 2, 4), 2, (0, 2, 10), 2048, linear_proj=True, label=2816),
        VAE: FULL_VAE,
        XL_1: clip(768, 12, 3072),
        XL_2: open_clip(1280, 32, 5120),
    },
}


def filled(
    shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Returns random tensors of these shapes; the weights of norms are around 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * 0.05
        tensors[name] = (values + (len(shape) == 1 and name.endswith("weight"))).to(dtype)
    return tensors


def write_single_file(
    path: Path,
    kind: str,
    *,
    without: str = "none",
    metadata: dict[str, str] | None = None,
    **more: torch.Tensor,
) -> Path:
    """Writes a tiny model of a kind in TINY and returns the path.

    Tensors whose names start with `without` are omitted. `more` are added or replaced.
    """
    tensors = {
        name: tensor
        for name, tensor in filled(whole(TINY[kind])).items()
        if not name.startswith(without)
    }
    save_file(tensors | more, path, metadata)
    return path
