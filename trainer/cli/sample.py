"""The command that makes an image: sample."""

import argparse
import re
from pathlib import Path
from typing import Any

from trainer import config
from trainer.cli import adapters
from trainer.errors import ConfigError


def add_commands(commands: Any) -> None:
    sample = commands.add_parser("sample", help="make a picture, with adapters at any strength")
    sample.add_argument("--prompt", default="")
    sample.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[:TEXT]]",
        help="a .safetensors adapter, as often as wanted",
    )
    sample.add_argument(
        "--base",
        default=config.EMBEDDED,
        help="base model: embedded, a .safetensors file, a folder or a Hugging Face id",
    )
    sample.add_argument("--vae", default="", help="another VAE than the base's own")
    sample.add_argument(
        "--clip-skip", type=int, default=1, help="as the adapter was trained (base.clip_skip)"
    )
    sample.add_argument(
        "--caption-tokens",
        type=int,
        default=75,
        help="as the adapter was trained (dataset.caption_tokens)",
    )
    sample.add_argument("--negative-prompt", default="")
    sample.add_argument("--seed", type=int, default=1)
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument("--guidance", type=float, default=7.0)
    sample.add_argument(
        "--size", default="0x0", metavar="WxH", help="the base's own size by default"
    )
    sample.add_argument("--output", type=Path, default=Path("sample.png"))
    sample.add_argument(
        "--serve",
        action="store_true",
        help="answer JSON requests on standard input instead (what the page uses)",
    )
    sample.set_defaults(command=sample_command)


def sample_command(options: argparse.Namespace) -> int:
    from trainer.models import libraries

    libraries.configure_libraries()
    from trainer.inference.samples import Sampler, parse_request, serve

    if options.serve:
        serve()
        return 0
    if not re.fullmatch(r"\d{1,4}x\d{1,4}", options.size):
        raise ConfigError(f"--size takes WxH, for example 512x768; got {options.size!r}.")
    width, height = map(int, options.size.split("x"))
    stack = [adapters.stacked(text) for text in options.adapter]
    request = parse_request(
        {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "seed": options.seed,
            "inference_steps": options.steps,
            "guidance_scale": options.guidance,
            "width": width,
            "height": height,
            "adapters": stack,
            "base": {"model": options.base, "vae": options.vae, "clip_skip": options.clip_skip},
            "caption_tokens": options.caption_tokens,
            "target": str(options.output),
        }
    )
    print(Sampler().render(request))
    return 0
