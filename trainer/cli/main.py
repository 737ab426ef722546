"""The command line: `python -m trainer COMMAND`. The only place that turns an error into a message.

Exit code 0: done. 1: failed, with a sentence. 2: wrong usage. 3: stopped on request, with everything saved.
"""

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import __version__, config
from trainer.cli import adapters, sweep
from trainer.config import presets
from trainer.errors import ConfigError, TrainerError
from trainer.runs import cache_limits, run_folder, run_requests
from trainer.training import launch
from trainer.training.runner import STOPPED, run_in, with_whole_paths


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except TrainerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description="Trains LoRA adapters for Stable Diffusion."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train an adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains an adapter from a run.toml or a preset.",
        epilog=_settings_help(),
    )
    _add_recipe(train)
    train.add_argument("--name", help="name of the adapter")
    train.set_defaults(command=train_command)

    grid = commands.add_parser(
        "sweep",
        help="train every combination of some settings, and compare what comes out",
        description="Makes a run for each combination and trains them one after the other; a table and a plot say what came out. "
        "With the folder of a sweep: trains what is left of it, and writes both anew.",
    )
    _add_recipe(grid, "RUN.toml|PRESET|SWEEP_DIR")
    grid.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="a setting and its values, as often as wanted",
    )
    grid.add_argument("--name", help="name of the sweep, with which the names of its runs begin")
    grid.add_argument(
        "--queue",
        action="store_true",
        help="leave the training to the page: the runs wait in its queue",
    )
    grid.set_defaults(command=sweep_command)

    classes = commands.add_parser(
        "class-pictures",
        help="make the class pictures of a recipe ahead of its training",
        description="Fills dataset.regularisation_folder with dataset.class_pictures pictures of dataset.class_words, made by the base.",
    )
    _add_recipe(classes)
    classes.set_defaults(command=class_pictures_command, name=None)

    resume = commands.add_parser("resume", help="start or continue the run in a folder")
    resume.add_argument("folder", type=Path, metavar="RUN_DIR")
    resume.set_defaults(command=lambda o: run_in(o.folder))

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

    check = commands.add_parser("check", help="say what a dataset is worth before training on it")
    check.add_argument("dataset", type=Path)
    check.add_argument("--resolution", type=int, default=512)
    check.add_argument("--trigger", default="")
    check.add_argument("--json", action="store_true")
    check.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="KIND[:CURE]",
        help="cure all findings of a kind, named in brackets in the list; --undo takes it back",
    )
    check.add_argument(
        "--undo", action="store_true", help="take back the last change made to the dataset"
    )
    check.set_defaults(command=check_command)

    caption = commands.add_parser(
        "caption", help="let models write captions for the pictures of a dataset"
    )
    caption.add_argument("dataset", type=Path)
    caption.add_argument(
        "--model",
        default="",
        metavar="ID|DIR",
        help="writes sentences: a BLIP, BLIP-2, GIT or Florence-2",
    )
    caption.add_argument(
        "--tagger", default="", metavar="ID|DIR", help="writes tags: one of the WD14 kind"
    )
    caption.add_argument("--prefix", default="", help="put in front of each caption")
    caption.add_argument(
        "--overwrite", action="store_true", help="also where there is a caption; else it is kept"
    )
    caption.add_argument(
        "--threshold",
        type=float,
        default=0.35,
        help="tags less sure than this are left out (default: %(default)s)",
    )
    caption.add_argument(
        "--character-threshold",
        type=float,
        default=0.85,
        help="the same for names of characters (default: %(default)s)",
    )
    caption.add_argument(
        "--blacklist", default="", metavar="TAG,TAG", help="tags that are never written"
    )
    caption.set_defaults(command=caption_command)

    info = commands.add_parser("info", help="say what an adapter or a base model holds")
    info.add_argument(
        "file",
        type=Path,
        help="a file, or the folder of a PEFT adapter or of a base model in diffusers' layout",
    )
    info.add_argument("--json", action="store_true")
    info.add_argument(
        "--ranks",
        action="store_true",
        help="also what of an adapter would be kept at smaller ranks",
    )
    info.set_defaults(command=info_command)

    cache = commands.add_parser("cache", help="say how large the caches are, or clear them")
    cache.add_argument(
        "--clear", action="store_true", help="delete latents, embeddings, thumbnails and previews"
    )
    cache.set_defaults(command=cache_command)

    adapters.add_to(commands)

    demo = commands.add_parser(
        "demo", help="train the example subject on the embedded base and report what it learned"
    )
    demo.add_argument("--output", type=Path, help="where the run folder goes (outputs/runs)")
    demo.set_defaults(command=demo_command)
    return parser


def _add_recipe(parser: argparse.ArgumentParser, what: str = "RUN.toml|PRESET") -> None:
    parser.add_argument(
        "recipe", metavar=what, help=f"a file, or one of: {', '.join(presets.load_presets())}"
    )
    parser.add_argument(
        "--dataset", type=Path, metavar="DIR", help="folder with pictures and captions"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="any setting of `train --help`, as often as wanted",
    )


def _settings_help() -> str:
    lines = ["settings for --set (their defaults are those of the recipe):"]
    for path, field in config.fields():
        words = (
            f" one of {', '.join(map(str, config.choices(field)))}."
            if config.choices(field)
            else ""
        )
        words = (
            f" Some of {', '.join(several)}."
            if (several := config.several_choices(field))
            else words
        )
        lines.append(f"  {path}\n      {field.description}{words}")
    return "\n".join(lines).replace("%", "%%")


def read_recipe(options: argparse.Namespace) -> config.RunConfig:
    path = Path(options.recipe)
    run = (
        config.load(path)
        if path.suffix == ".toml" or path.is_file()
        else presets.load_preset(options.recipe).config
    )
    changes = dict(config.parse_setting(text) for text in options.settings)
    if options.dataset:
        changes["dataset.folder"] = str(options.dataset.resolve())
    if options.name:
        changes["name"] = options.name
    return config.replace(run, changes)


def train_command(options: argparse.Namespace) -> int:
    run = _read_run(options)
    if not launch.is_one_of_several():
        return run_in(run_folder.create(run))
    from trainer.training.distributed import join

    world = join()
    return run_in(
        Path(world.agree_on_text(str(run_folder.create(run).resolve()) if world.is_main else "")),
        world,
    )


def sweep_command(options: argparse.Namespace) -> int:
    if launch.is_one_of_several():
        raise ConfigError(
            "A sweep starts its runs itself: set training.devices, and start it without torchrun."
        )
    if (Path(options.recipe) / "sweep.json").is_file():
        if options.grid or options.settings or options.dataset or options.name:
            raise ConfigError(
                f"{options.recipe} is a sweep whose settings are made; start a new one from a preset or a run.toml."
            )
        folder = Path(options.recipe)
    elif not options.grid:
        raise ConfigError(
            "Which settings? Give --grid KEY=VALUE,VALUE, for example --grid adapter.rank=8,16."
        )
    else:
        folder = sweep.create(_read_run(options), [sweep.parse_grid(text) for text in options.grid])
    if options.queue:
        sweep.leave_in_queue(folder)
        print(
            f"The runs wait in the page's queue. When they are done: python -m trainer sweep {folder}"
        )
        return 0
    code = sweep.train(folder, run_in, STOPPED)
    print(f"\n{sweep.write_results(folder)}\n\n{folder / 'results.md'}")
    return code


def _read_run(options: argparse.Namespace) -> config.RunConfig:
    """The recipe of a training, with its pictures."""
    run = read_recipe(options)
    if not run.dataset.folder:
        raise ConfigError("Which pictures? Give --dataset DIR, or dataset.folder in the file.")
    return with_whole_paths(run)


def cache_command(options: argparse.Namespace) -> int:
    print(
        f"{cache_limits.cache_folder()} holds {cache_limits.size() / 1e6:,.1f} MB; the limit is {cache_limits.limit() / 1e9:g} GB ($ATELIER_CACHE_GB)."
    )
    if options.clear:
        print(
            f"{cache_limits.clear() / 1e6:,.1f} MB were freed; what is needed again is made anew."
        )
    return 0


def class_pictures_command(options: argparse.Namespace) -> int:
    run = read_recipe(options)
    if not run.dataset.class_pictures:
        raise ConfigError(
            "How many, of what, and where to? Set dataset.class_pictures, dataset.class_words and dataset.regularisation_folder."
        )
    from trainer.families import load_base
    from trainer.inference import class_images
    from trainer.models import libraries
    from trainer.models.device import DTYPES, choose_device, choose_precision

    libraries.configure_libraries()
    device = choose_device()
    base = load_base(run.base, DTYPES[choose_precision(run.base.precision, device)])
    made = class_images.fill(
        run,
        base,
        device,
        lambda event: print(f"class picture {event.done + 1} of {event.total}", flush=True),
    )
    print(f"{made} made in {run.dataset.regularisation_folder}")
    return 0


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


def check_command(options: argparse.Namespace) -> int:
    from trainer.curation import fixes, history
    from trainer.data.checks import verdict
    from trainer.data.scan import scan_dataset

    def scan() -> tuple:
        return scan_dataset(options.dataset, resolution=options.resolution, trigger=options.trigger)

    if options.undo:
        label, kept = history.undo(options.dataset)
        print(
            f"Taken back: {label}.",
            *(f"{name} was changed since and stays." for name in kept),
            file=sys.stderr,
        )
    for wanted in options.fix:
        kind, _, name = wanted.partition(":")
        if kind not in fixes.FIXES_FOR_KIND:
            raise ConfigError(
                f"--fix takes the kind of a finding, one of {', '.join(fixes.FIXES_FOR_KIND)}; got {kind}."
            )
        found = [finding for finding in scan()[1] if finding.kind == kind]
        if found:
            name = name or fixes.FIXES_FOR_KIND[kind][0]
            print(
                f"{fixes.FIXES[name].label}: {fixes.apply(options.dataset, found, name)} files changed.",
                file=sys.stderr,
            )
    items, findings = scan()
    if options.json:
        found = [
            vars(finding) | {"cures": fixes.FIXES_FOR_KIND.get(finding.kind, ())}
            for finding in findings
        ]
        print(
            json.dumps(
                {
                    "verdict": verdict(len(items), findings),
                    "pictures": len(items),
                    "findings": found,
                },
                indent=1,
            )
        )
        return 0
    for finding in findings:
        print(
            f"{finding.level:8} {finding.file}: {finding.message}{f' [{finding.kind}]' if finding.kind else ''}"
        )
    print(verdict(len(items), findings))
    return 0


def caption_command(options: argparse.Namespace) -> int:
    from trainer.curation import autocaption as caption

    if not options.dataset.is_dir():
        raise ConfigError(f"{options.dataset} is not a folder: give the folder with the pictures.")
    wish = caption.CaptionRequest(
        options.model,
        options.tagger,
        options.prefix,
        options.overwrite,
        options.threshold,
        options.character_threshold,
        tuple(filter(None, map(str.strip, options.blacklist.split(",")))),
    )
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            name, lambda *_: run_requests.request(caption.job_folder(options.dataset), "stop")
        )
    written = caption.caption_dataset(options.dataset, wish, lambda text: print(text, flush=True))
    print(
        f"{written} captions written; python -m trainer check {options.dataset} --undo takes them back."
    )
    return 0


def info_command(options: argparse.Namespace) -> int:
    from trainer.cli.info import describe

    facts = describe(options.file)
    ranks = _energy_by_rank(options.file) if options.ranks else []
    if options.json:
        print(json.dumps(facts | ({"ranks": ranks} if options.ranks else {}), ensure_ascii=False))
        return 0
    rows = [
        f"rank {rank} keeps {whole:.2%} of the whole, {worst:.2%} of the layer that loses most"
        for rank, whole, worst in ranks
    ]
    print("\n".join([*(f"{key + ':':22}{value}" for key, value in facts.items()), *rows]))
    return 0


def _energy_by_rank(file: Path) -> list[tuple[int, float, float]]:
    from trainer.lora.formats.reader import read_adapter
    from trainer.lora.transform import energy_by_rank

    return energy_by_rank(read_adapter(file).modules)


def demo_command(options: argparse.Namespace) -> int:
    from trainer.cli.demo import demo

    return demo(options.output or run_folder.runs_folder(), run_in)


if __name__ == "__main__":
    sys.exit(main())
