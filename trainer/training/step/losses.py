"""One forward pass to a loss, for every family. All random draws come from (seed, position)."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.data.augment import vary_caption, without_trigger
from trainer.data.examples import Example, View
from trainer.data.sampler import batch_at
from trainer.families.base import Batch, Conditioning
from trainer.families.objective import (
    Noised,
    image_losses,
    offset_noise,
    pyramid_noise,
    sample_places,
)
from trainer.lora import inject
from trainer.models.device import send
from trainer.models.seeds import generator_for, seed_for
from trainer.training.session import Session, shape_buckets


def spread_places(count: int, generator: torch.Generator) -> Tensor:
    """Places in 0..1, [count], each uniform, spread evenly over the range within one batch.

    Fewer draws of the same noise level in a batch make its loss less noisy (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    return (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1


def timesteps_at(session: Session, places: Tensor) -> Tensor:
    """Uniform places to timesteps as the settings have them sampled, [B], on the training device."""
    chosen = session.run.objective.timestep_sampling
    sampling = session.objective.timestep_sampling if chosen == "auto" else chosen
    return session.objective.timesteps(
        send(sample_places(places, sampling, session.run.objective), session.device)
    )


def microbatch_losses(
    session: Session,
    buckets: Sequence[Sequence[int]],
    microbatch: int,
    piece: int = 0,
    pieces: int = 1,
) -> Iterator[Tensor]:
    """The loss of the microbatch with this number since the start of the training, in summands: float32 scalars with gradients.

    They are those of its pictures, of what the adapter does without the trigger, and of the class pictures. Each can be differentiated
    before the next is asked for, so that the activations of only one are in memory. Where memory is short each goes through the model in
    pieces: the share of one of them is given, and the shares sum to the loss. Pictures, noise, timesteps and captions are those of the
    whole; only the adapter's own dropout is drawn anew for each piece.
    """
    training, seed = session.run.training, session.run.training.seed
    examples = [
        session.examples[i] for i in batch_at(buckets, training.batch_size, seed, microbatch)
    ]
    yield from _examples_losses(session, examples, "", microbatch, piece, pieces)
    if session.class_examples:
        chosen = batch_at(
            shape_buckets(session.class_examples),
            training.batch_size,
            seed_for(seed, "class"),
            microbatch,
        )
        for of_class in _examples_losses(
            session,
            [session.class_examples[i] for i in chosen],
            "class ",
            microbatch,
            piece,
            pieces,
        ):
            yield session.run.dataset.prior_loss_weight * of_class


def _examples_losses(
    session: Session,
    examples: Sequence[Example],
    purpose: str,
    microbatch: int,
    piece: int,
    pieces: int,
) -> Iterator[Tensor]:
    """`purpose` keeps the random draws of the pictures and of the class pictures apart."""
    settings, seed = session.run.objective, session.run.training.seed
    views, captions = zip(
        *(_seen(session, e, (purpose, microbatch, place)) for place, e in enumerate(examples)),
        strict=True,
    )
    draws = generator_for(seed, purpose + "draws", microbatch)
    latents = torch.stack(
        [view.mean + view.std * torch.randn(view.mean.shape, generator=draws) for view in views]
    )
    noise = _noise(session, latents.shape, draws)
    timesteps = timesteps_at(session, spread_places(len(views), draws))
    dropped = (
        torch.rand(len(views), generator=draws) < session.run.dataset.caption_dropout
    ).tolist()
    captions = tuple(
        "" if drop else caption for caption, drop in zip(captions, dropped, strict=True)
    )
    perturbed = (
        noise + settings.input_perturbation * torch.randn(noise.shape, generator=draws)
        if settings.input_perturbation
        else noise
    )
    place = (microbatch, piece) if piece else (microbatch,)
    torch.manual_seed(
        seed_for(seed, purpose + "dropout", *place)
    )  # the adapter's dropout draws from the global generator
    part = slice(piece * len(views) // pieces, (piece + 1) * len(views) // pieces)
    views, captions, share = views[part], captions[part], len(views[part]) / len(views)
    if not share:
        return  # more pieces than pictures
    learns = session.learns(
        "text_encoder", microbatch // session.run.training.gradient_accumulation_steps + 1
    )
    batch = Batch(
        _scaled(session, latents[part]),
        _conditioning(session, captions, learns),
        _size_ids(session, views),
    )
    noised = _noised(session, batch, noise[part], timesteps[part], perturbed[part])
    yield share * _losses(session, batch, noised, _mask(session, views)).mean()
    if settings.prior_preservation and not purpose:
        yield (
            share
            * settings.prior_preservation
            * _prior_loss(session, batch, noised, captions, learns)
        )


def _seen(session: Session, example: Example, place: tuple[object, ...]) -> tuple[View, str]:
    """How a picture is seen this once: one of its views, one of its captions."""
    draws = random.Random(seed_for(session.run.training.seed, "seen", *place))
    view = example.views[draws.randrange(len(example.views))]
    of_class = place[0] == "class "
    return view, example.caption if of_class else vary_caption(
        example.wording, session.run.dataset, draws
    )


def _prior_loss(
    session: Session, batch: Batch, noised: Noised, captions: Sequence[str], learns: bool
) -> Tensor:
    """How far the adapter moves what the base makes of the same noise and of captions without the trigger; both are of the same family."""
    neutral, components = (
        [without_trigger(caption, session.run.dataset) for caption in captions],
        session.components.values(),
    )
    with torch.no_grad(), inject.adapters_disabled(components):
        alone = replace(batch, conditioning=_conditioning(session, neutral, learns=False))
        target = session.base.family.predict(session.base.denoiser, noised, alone)
    ours = replace(batch, conditioning=_conditioning(session, neutral, learns))
    return _losses(session, ours, replace(noised, target=target), None).mean()


def _noise(session: Session, shape: torch.Size, draws: torch.Generator) -> Tensor:
    settings = session.run.objective
    noise = pyramid_noise(torch.randn(shape, generator=draws), settings.pyramid_noise, draws)
    return offset_noise(noise, settings.noise_offset, draws, settings.noise_offset_random)


def _conditioning(session: Session, captions: Sequence[str], learns: bool = False) -> Conditioning:
    """`learns`: with gradients for the text encoders that are trained."""
    if session.texts is None:
        with torch.set_grad_enabled(learns):
            return session.encode(captions)
    chosen = [session.texts[caption] for caption in captions]
    return {
        name: send(torch.stack([c[name] for c in chosen]), session.device) for name in chosen[0]
    }


def _size_ids(session: Session, views: Sequence[View]) -> Tensor:
    return send(
        torch.tensor([view.size_ids for view in views], dtype=torch.float32), session.device
    )


def _mask(session: Session, views: Sequence[View]) -> Tensor | None:
    """[B, 1, h, w]; None where every place of every picture counts alike."""
    if all(view.mask is None for view in views):
        return None
    whole = torch.ones(1, *views[0].mean.shape[1:])
    return send(
        torch.stack([whole if view.mask is None else view.mask for view in views]), session.device
    )


def _scaled(session: Session, latents: Tensor) -> Tensor:
    """As the denoiser knows them: around zero, with a spread of about one."""
    vae = session.base.pipe.vae.config
    return send((latents - (vae.shift_factor or 0)) * vae.scaling_factor, session.device)


def _noised(
    session: Session, batch: Batch, noise: Tensor, timesteps: Tensor, perturbed: Tensor
) -> Noised:
    """The denoiser sees `perturbed` noise, and is asked for `noise`."""
    noised = session.objective.noised(batch.latents, send(noise, session.device), timesteps)
    if not session.run.objective.input_perturbation:
        return noised
    return replace(
        noised,
        noisy_latents=session.objective.noised(
            batch.latents, send(perturbed, session.device), timesteps
        ).noisy_latents,
    )


def _losses(session: Session, batch: Batch, noised: Noised, mask: Tensor | None) -> Tensor:
    """Of each picture, [B]."""
    model_pred = session.predict(noised, batch)
    return image_losses(session.objective, model_pred, noised, session.run.objective, mask)
