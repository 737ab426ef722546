"""The command that generates an image: sample."""

import argparse
import re
from pathlib import Path

from trainer import config
from trainer.cli.adapter_options import parse_adapter
from trainer.cli.run_options import Commands
from trainer.errors import ConfigError


def add_commands(commands: Commands) -> None:
    sample = commands.add_parser("sample", help="generate an image, with adapters at any strength")
    sample.add_argument("--prompt", default="")
    sample.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[:TEXT]]",
        help="a .safetensors adapter; can be repeated",
    )
    sample.add_argument(
        "--base",
        default=config.EMBEDDED,
        help="base model: embedded, a .safetensors file, a folder or a Hugging Face id",
    )
    sample.add_argument("--vae", default="", help="a VAE to use instead of the base's")
    sample.add_argument(
        "--clip-skip",
        type=int,
        default=1,
        help="the base.clip_skip that the adapter was trained with",
    )
    sample.add_argument(
        "--caption-tokens",
        type=int,
        default=75,
        help="the dataset.caption_tokens that the adapter was trained with",
    )
    sample.add_argument("--negative-prompt", default="")
    sample.add_argument("--seed", type=int, default=1)
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument("--guidance", type=float, default=7.0)
    sample.add_argument(
        "--size", default="0x0", metavar="WxH", help="in pixels (default: the base's size)"
    )
    sample.add_argument("--output", type=Path, default=Path("sample.png"))
    sample.add_argument(
        "--serve",
        action="store_true",
        help="answer JSON requests on standard input instead, for the page",
    )
    sample.set_defaults(command=sample_command)


def sample_command(options: argparse.Namespace) -> int:
    from trainer.models import libraries

    # Before importing diffusers, which reads these settings during its import.
    libraries.configure_libraries()
    from trainer.inference.request import parse_request
    from trainer.inference.samples import Sampler
    from trainer.inference.serving import serve

    if options.serve:
        serve()
        return 0
    if not re.fullmatch(r"\d{1,4}x\d{1,4}", options.size):
        raise ConfigError(f"--size takes WxH, for example 512x768; got {options.size!r}.")
    width, height = map(int, options.size.split("x"))
    request = parse_request(
        {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "seed": options.seed,
            "inference_steps": options.steps,
            "guidance_scale": options.guidance,
            "width": width,
            "height": height,
            "adapters": [parse_adapter(text) for text in options.adapter],
            "base": {"model": options.base, "vae": options.vae, "clip_skip": options.clip_skip},
            "caption_tokens": options.caption_tokens,
            "target": str(options.output),
        }
    )
    print(Sampler().render(request))
    return 0
