"""Samples during a training, and what they show."""

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image

from trainer.config import RunConfig
from trainer.data.augment import without_trigger
from trainer.data.examples import Example
from trainer.inference import sample_checks
from trainer.inference.samples import generate, sampler_name, save_sample
from trainer.runs import run_folder
from trainer.runs.events import (
    Probed,
    Progress,
    SampleSaved,
    Warned,
)
from trainer.training import oom_fallbacks
from trainer.training.session import Session


def sample(session: Session, step: int) -> None:
    """One picture a prompt, and what they give away. A failure here is a warning: the training itself is fine."""
    chosen, pipe, side = session.run.sampling, session.base.pipe, session.run.dataset.resolution
    text_encoders = (
        session.base.family.text_encoders(pipe).values() if session.texts is None else ()
    )
    homes = {part: part.device for part in (pipe.vae, *text_encoders)}
    prompts, drawn = sample_prompts(session.run, session.examples), []
    session.fallbacks.catch_up("sample", step)

    def draw(settings: dict) -> Image.Image:
        oom_fallbacks.set_tiling(pipe.vae, chosen.vae_tiling or "sample" in session.fallbacks.tiled)
        for part in homes:
            part.to(session.device)
        return generate(
            session.base,
            **settings,
            width=side,
            height=side,
            sampler=chosen.sampler,
            texts=session.texts,
        )

    def make(prompt: str, seed: int, file: str) -> Image.Image:
        settings: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": chosen.negative_prompt,
            "seed": seed,
            "inference_steps": chosen.inference_steps,
            "guidance_scale": chosen.guidance_scale,
        }
        image = session.fallbacks.attempt("sample", step, partial(draw, settings))
        save_sample(
            session.folder / file,
            image,
            **settings,
            sampler=sampler_name(pipe, chosen.sampler),
            note=f"Step: {step}",
        )
        return image

    try:
        for index, prompt in enumerate(prompts):
            session.log.append(Progress("sampling", index, len(prompts)))
            file = sample_file(step, index)
            drawn.append(make(prompt, chosen.seed + index, file))
            session.log.append(SampleSaved(step, prompt, chosen.seed + index, file))
        session.log.append(probed(session, step, prompts[0], drawn, make))
    except (
        Exception
    ) as error:  # whatever it is, the training itself is fine; the log has the details
        traceback.print_exc()
        what = f"The samples of step {step} could not all be made and measured"
        session.log.append(Warned(f"{what} ({str(error)[:200]}); the training goes on."))
    finally:
        for part, home in homes.items():
            part.to(home)


def sample_file(step: int, name: int | str) -> str:
    return f"samples/{step:06d}-{name}{run_folder.SAMPLE_SUFFIX}"


def probed(
    session: Session,
    step: int,
    prompt: str,
    drawn: Sequence[Image.Image],
    make: Callable[[str, int, str], Image.Image],
) -> Probed:
    """Draws the first prompt without its trigger and compares it with the base's; how near the samples come to the training pictures."""
    dataset, seed = session.run.dataset, session.run.sampling.seed
    facts: dict[str, Any] = {}
    without = without_trigger(prompt, dataset)
    if without != prompt:
        picture = make(without, seed, sample_file(step, "without"))
        facts = {"prompt": without, "seed": seed, "file": sample_file(step, "without")}
        of_base = [session.folder / sample_file(0, name) for name in (0, "without")]
        if step and all(path.is_file() for path in of_base):
            first, second = (Image.open(path) for path in of_base)
            facts["leak"] = sample_checks.leak((first, drawn[0]), (second, picture))
    pictures = [
        example.mean for example in session.examples if example.resolution == dataset.resolution
    ]
    if found := sample_checks.likeness(
        sample_checks.latents_of(session.base.pipe, drawn), pictures
    ):
        facts |= {"likeness": found[0], "likeness_between": found[1]}
    return Probed(step, **facts)


def sample_prompts(run: RunConfig, examples: Sequence[Example]) -> list[str]:
    """The chosen prompts, else the captions of two pictures."""
    return (
        list(run.sampling.prompts)
        or [e.caption for e in examples if e.resolution == run.dataset.resolution][:2]
    )
