"""The forward pass of a step, from a batch to a loss, for every family.

All random draws are functions of the seed and the position in the training, so a resumed run
needs no generator state and sampling cannot disturb the training.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    sample_positions,
)
from trainer.lora import inject
from trainer.models.device import send
from trainer.models.seeds import generator_for, seed_for
from trainer.training.session import Session

OF_IMAGES, OF_CLASS = "", "class "
"""Prefixes of the random draws, which keep images and class images apart."""


def microbatch_losses(
    session: Session, microbatch: int, piece: int = 0, pieces: int = 1
) -> Iterator[Tensor]:
    """Yields the loss of a microbatch in summands, float32 scalars with gradients.

    The summands are the loss on the images, the prior preservation without the trigger, and the
    loss on the class images. The caller differentiates each before the next, so only one set of
    activations is in memory.

    `microbatch` counts from the start of the training. If memory is short, the microbatch goes
    through the model in several pieces, and this yields the share of one piece; all shares sum to
    the loss. Images, noise, timesteps and captions do not depend on the number of pieces. Only the
    adapter's dropout does.
    """
    run, data = session.run, session.data
    batch_size, seed = run.training.batch_size, run.training.seed
    part = MicrobatchPart(microbatch, piece, pieces)
    chosen = batch_at(data.buckets, batch_size, seed, microbatch)
    yield from _summands(session, [data.examples[i] for i in chosen], OF_IMAGES, part)
    if data.class_examples:
        chosen = batch_at(data.class_buckets, batch_size, seed_for(seed, "class"), microbatch)
        class_examples = [data.class_examples[i] for i in chosen]
        for summand in _summands(session, class_examples, OF_CLASS, part):
            yield run.dataset.prior_loss_weight * summand


@dataclass(frozen=True)
class MicrobatchPart:
    """One of the equal pieces of a microbatch."""

    microbatch: int
    piece: int
    pieces: int

    def slice(self, count: int) -> slice:
        """Returns which of `count` images are in the piece; none if there are more pieces."""
        return slice(
            self.piece * count // self.pieces,
            (self.piece + 1) * count // self.pieces,
        )

    @property
    def position(self) -> tuple[int, ...]:
        """The position in the training that seeds the adapter's dropout."""
        return (self.microbatch, self.piece) if self.piece else (self.microbatch,)


def _summands(
    session: Session, examples: Sequence[Example], purpose: str, part: MicrobatchPart
) -> Iterator[Tensor]:
    """Yields the loss on some images, and their prior preservation if the settings ask for it."""
    run, count = session.run, len(examples)
    seed, microbatch = run.training.seed, part.microbatch

    # Draw for the whole microbatch, so that a piece gets the numbers that it has in the whole.
    seen = [
        _view_and_caption(session, example, purpose, microbatch, index)
        for index, example in enumerate(examples)
    ]
    views = [view for view, _ in seen]
    draws = generator_for(seed, purpose + "draws", microbatch)
    latents = torch.stack([_sampled_latents(view, draws) for view in views])
    noise = _noise(session, latents.shape, draws)
    timesteps = timesteps_at(session, stratified_uniform(count, draws))
    captions = _with_dropped_captions(session, [caption for _, caption in seen], draws)
    perturbed_noise = noise
    if run.objective.input_perturbation:
        added = torch.randn(noise.shape, generator=draws)
        perturbed_noise = noise + run.objective.input_perturbation * added
    # The adapter's dropout draws from the global generator.
    torch.manual_seed(seed_for(seed, purpose + "dropout", *part.position))

    # Keep this piece.
    piece = part.slice(count)
    views, captions = views[piece], captions[piece]
    if not views:
        return
    share = len(views) / count

    # Through the model.
    step = microbatch // run.training.gradient_accumulation_steps + 1
    learns = session.learns("text_encoder", step)
    batch = Batch(
        scaled_latents(session, latents[piece]),
        conditioning_for(session, captions, learns),
        size_ids_of(session, views),
    )
    noised = _noised(session, batch, noise[piece], timesteps[piece], perturbed_noise[piece])
    yield share * denoising_losses(session, batch, noised, mask_of(session, views)).mean()
    if run.objective.prior_preservation and purpose == OF_IMAGES:
        prior_loss = _prior_loss(session, batch, noised, captions, learns)
        yield share * run.objective.prior_preservation * prior_loss


def stratified_uniform(count: int, generator: torch.Generator) -> Tensor:
    """Returns `count` uniform draws in [0, 1), [count], spread evenly with one random offset.

    A batch whose noise levels are spread has a less noisy loss than one with independent draws
    (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    return (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1


def timesteps_at(session: Session, uniform: Tensor) -> Tensor:
    """Maps draws in [0, 1) to timesteps, [B], on the device, by the settings' distribution."""
    settings = session.run.objective
    chosen = settings.timestep_sampling
    sampling = session.model.objective.timestep_sampling if chosen == "auto" else chosen
    positions = sample_positions(uniform, sampling, settings)
    return session.model.objective.timesteps(send(positions, session.device))


def _view_and_caption(
    session: Session, example: Example, purpose: str, microbatch: int, index: int
) -> tuple[View, str]:
    """Draws one of the image's cached views and one wording of its caption."""
    draws = random.Random(seed_for(session.run.training.seed, "seen", purpose, microbatch, index))
    view = example.views[draws.randrange(len(example.views))]
    if purpose == OF_CLASS:
        return view, example.caption
    return view, vary_caption(example.wording, session.run.dataset, draws)


def _sampled_latents(view: View, draws: torch.Generator) -> Tensor:
    """Draws from the latent distribution that the VAE's encoder returned, [C, h, w]."""
    return view.mean + view.std * torch.randn(view.mean.shape, generator=draws)


def _noise(session: Session, shape: torch.Size, draws: torch.Generator) -> Tensor:
    settings = session.run.objective
    noise = pyramid_noise(torch.randn(shape, generator=draws), settings.pyramid_noise, draws)
    return offset_noise(noise, settings.noise_offset, draws, settings.noise_offset_random)


def _with_dropped_captions(
    session: Session, captions: Sequence[str], draws: torch.Generator
) -> list[str]:
    """Replaces a random fraction of the captions, `dataset.caption_dropout`, by the empty one."""
    dropped = torch.rand(len(captions), generator=draws) < session.run.dataset.caption_dropout
    return [
        "" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)
    ]


def _prior_loss(
    session: Session, batch: Batch, noised: Noised, captions: Sequence[str], learns: bool
) -> Tensor:
    """Returns how far the adapter changes the base's prediction for captions without the trigger.

    Both predictions are of the same noisy latents of the trained images.
    """
    base = session.model.base
    neutral = [without_trigger(caption, session.run.dataset) for caption in captions]
    with torch.no_grad(), inject.adapters_disabled(session.model.components.values()):
        without_adapter = replace(batch, conditioning=conditioning_for(session, neutral))
        target = base.family.predict(base.denoiser, noised, without_adapter)
    with_adapter = replace(batch, conditioning=conditioning_for(session, neutral, learns))
    return denoising_losses(session, with_adapter, replace(noised, target=target), None).mean()


def _noised(
    session: Session, batch: Batch, noise: Tensor, timesteps: Tensor, perturbed_noise: Tensor
) -> Noised:
    """Adds noise to the latents. With input perturbation the target stays the unperturbed noise.

    The perturbation imitates the errors of earlier sampling steps (Ning et al. 2023,
    arXiv:2301.11706).
    """
    objective = session.model.objective
    noised = objective.noised(batch.latents, send(noise, session.device), timesteps)
    if not session.run.objective.input_perturbation:
        return noised
    perturbed = objective.noised(batch.latents, send(perturbed_noise, session.device), timesteps)
    return replace(noised, noisy_latents=perturbed.noisy_latents)


# What the validation loss shares with the training loss.


def conditioning_for(
    session: Session, captions: Sequence[str], learns: bool = False
) -> Conditioning:
    """Returns the conditioning of captions on the device.

    `learns`: whether the text encoders get gradients, if they run in every step.
    """
    texts = session.data.texts
    if texts is None:
        with torch.set_grad_enabled(learns):
            return session.encode(captions)
    chosen = [texts[caption] for caption in captions]
    return {
        name: send(torch.stack([one[name] for one in chosen]), session.device) for name in chosen[0]
    }


def size_ids_of(session: Session, views: Sequence[View]) -> Tensor:
    """Returns SDXL's size and crop conditioning of each view, [B, 6], on the device."""
    size_ids = torch.tensor([view.size_ids for view in views], dtype=torch.float32)
    return send(size_ids, session.device)


def mask_of(session: Session, views: Sequence[View]) -> Tensor | None:
    """Returns the loss weights of the latent positions, [B, 1, h, w], or None if all are equal."""
    if all(view.mask is None for view in views):
        return None
    unmasked = torch.ones(1, *views[0].mean.shape[1:])
    masks = [unmasked if view.mask is None else view.mask for view in views]
    return send(torch.stack(masks), session.device)


def scaled_latents(session: Session, latents: Tensor) -> Tensor:
    """Shifts and scales the VAE's latents to the denoiser's range, on the device."""
    vae = session.model.base.pipe.vae.config
    return send((latents - (vae.shift_factor or 0)) * vae.scaling_factor, session.device)


def denoising_losses(session: Session, batch: Batch, noised: Noised, mask: Tensor | None) -> Tensor:
    """Returns the loss of each image, [B], with the weighting of the settings."""
    model_pred = session.model.predict(noised, batch)
    objective = session.model.objective
    return image_losses(objective, model_pred, noised, session.run.objective, mask)
