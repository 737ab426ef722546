"""Samples during a training, and what they reveal: trigger leakage and likeness to the dataset."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypedDict

from PIL import Image
from torch import nn

from trainer.config import RunConfig
from trainer.data.augment import without_trigger
from trainer.data.examples import Example
from trainer.inference import sample_checks
from trainer.inference.samples import generate, sampler_name, save_sample
from trainer.runs import run_folder
from trainer.runs.events import Probed, Progress, SampleSaved, Warned
from trainer.training import oom_fallbacks
from trainer.training.session import Session

WITHOUT_TRIGGER = "without"
"""In the file name of the sample whose prompt lacks the trigger word."""
MAX_CAPTION_PROMPTS = 2


class SampleSettings(TypedDict):
    """What a sample is generated from, apart from the model."""

    prompt: str
    negative_prompt: str
    seed: int
    inference_steps: int
    guidance_scale: float


def sample_prompts(run: RunConfig, examples: Sequence[Example]) -> list[str]:
    """Returns the prompts of the settings, or else the captions of two images."""
    if run.sampling.prompts:
        return list(run.sampling.prompts)
    resolution = run.dataset.resolution
    captions = [example.caption for example in examples if example.resolution == resolution]
    return captions[:MAX_CAPTION_PROMPTS]


def sample_file(step: int, name: int | str) -> str:
    """Returns the path of a sample, relative to the run folder."""
    return f"samples/{step:06d}-{name}{run_folder.SAMPLE_SUFFIX}"


def draw_samples(session: Session, step: int) -> None:
    """Generates one sample per prompt and reports what they reveal.

    A failure is only a warning, because the training itself is not affected.
    """
    prompts = sample_prompts(session.run, session.data.examples)
    session.fallbacks.catch_up("sample", step)
    try:
        with _returned_to_their_devices(_parts(session)):
            images = []
            for index, prompt in enumerate(prompts):
                session.log.append(Progress("sampling", index, len(prompts)))
                seed = session.run.sampling.seed + index
                images.append(_draw_and_save(session, step, prompt, seed, index))
                session.log.append(SampleSaved(step, prompt, seed, sample_file(step, index)))
            session.log.append(_probe(session, step, prompts[0], images))
    except Exception as error:
        traceback.print_exc()
        session.log.append(
            Warned(
                f"The samples of step {step} could not all be generated and compared "
                f"({str(error)[:200]}); the training continues."
            )
        )


def _parts(session: Session) -> list[nn.Module]:
    """Returns the parts that are on the device only while sampling, or while encoding texts."""
    base = session.model.base
    parts: list[nn.Module] = [base.pipe.vae]
    if session.data.texts is None:
        parts += base.family.text_encoders(base.pipe).values()
    return parts


@contextmanager
def _returned_to_their_devices(parts: Sequence[Any]) -> Iterator[None]:
    """Moves the parts back to where they are now, at the end of the block."""
    devices = [part.device for part in parts]
    try:
        yield
    finally:
        for part, device in zip(parts, devices, strict=True):
            part.to(device)


def _draw_and_save(
    session: Session, step: int, prompt: str, seed: int, name: int | str
) -> Image.Image:
    """Generates a sample and saves it with its settings. Raises OutOfMemory after all fallbacks."""
    sampling = session.run.sampling
    settings = SampleSettings(
        prompt=prompt,
        negative_prompt=sampling.negative_prompt,
        seed=seed,
        inference_steps=sampling.inference_steps,
        guidance_scale=sampling.guidance_scale,
    )
    image = session.fallbacks.attempt("sample", step, partial(_draw, session, settings))
    save_sample(
        session.folder / sample_file(step, name),
        image,
        **settings,
        sampler=sampler_name(session.model.base.pipe, sampling.sampler),
        note=f"Step: {step}",
    )
    return image


def _draw(session: Session, settings: SampleSettings) -> Image.Image:
    base, sampling = session.model.base, session.run.sampling
    is_tiled = sampling.vae_tiling or "sample" in session.fallbacks.tiled
    oom_fallbacks.set_tiling(base.pipe.vae, is_tiled)
    for part in _parts(session):
        part.to(session.device)
    side = session.run.dataset.resolution
    image: Image.Image = generate(
        base,
        **settings,
        width=side,
        height=side,
        sampler=sampling.sampler,
        texts=session.data.texts,
    )
    return image


def _probe(session: Session, step: int, prompt: str, images: Sequence[Image.Image]) -> Probed:
    """Compares samples with the base's samples and with the training images.

    The first prompt is sampled without its trigger too: if that changes as much as with the
    trigger, the adapter leaks into other prompts.
    """
    dataset, seed = session.run.dataset, session.run.sampling.seed
    fields: dict[str, Any] = {}
    neutral = without_trigger(prompt, dataset)
    if neutral != prompt:
        image = _draw_and_save(session, step, neutral, seed, WITHOUT_TRIGGER)
        fields = {"prompt": neutral, "seed": seed, "file": sample_file(step, WITHOUT_TRIGGER)}
        before = [session.folder / sample_file(0, name) for name in (0, WITHOUT_TRIGGER)]
        if step and all(path.is_file() for path in before):
            first, second = (Image.open(path) for path in before)
            fields["leak"] = sample_checks.leak((first, images[0]), (second, image))
    examples = session.data.examples
    latents = [each.mean for each in examples if each.resolution == dataset.resolution]
    sample_latents = sample_checks.latents_of(session.model.base.pipe, images)
    likeness = sample_checks.likeness(sample_latents, latents)
    if likeness:
        fields |= {"likeness": likeness[0], "likeness_between": likeness[1]}
    return Probed(step, **fields)
