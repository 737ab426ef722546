"""One forward pass to a loss, for every family. All random draws come from (seed, position)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.batches import batch_at, generator_for, seed_for
from trainer.families.base import Batch, Conditioning
from trainer.objective import offset_noise, picture_losses, pyramid_noise, sample_places
from trainer.prepare import Example, Session

VALIDATION_TIMESTEPS = 8


def spread_places(count: int, generator: torch.Generator) -> Tensor:
    """Places in 0..1, [count], each uniform, spread evenly over the range within one batch.

    Fewer draws of the same noise level in a batch make its loss less noisy (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    return (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1


def timesteps_at(session: Session, places: Tensor) -> Tensor:
    """Uniform places to timesteps as the settings have them sampled, [B], on the training device."""
    chosen = session.run.objective.timestep_sampling
    sampling = session.objective.timestep_sampling if chosen == "auto" else chosen
    return session.objective.timesteps(sample_places(places, sampling, session.run.objective).to(session.device))


def microbatch_loss(session: Session, buckets: Sequence[Sequence[int]], microbatch: int, piece: int = 0, pieces: int = 1) -> Tensor:
    """The loss of the microbatch with this number since the start of the training; a float32 scalar with gradients.

    Where memory is short it goes through the model in pieces: the share of one of them is returned, and the shares sum to the loss.
    Pictures, noise, timesteps and dropped captions are those of the whole; only the adapter's own dropout is drawn anew for each piece.
    """
    training, seed = session.run.training, session.run.training.seed
    examples = [session.examples[i] for i in batch_at(buckets, training.batch_size, seed, microbatch)]
    draws = generator_for(seed, "draws", microbatch)
    latents = torch.stack([e.mean + e.std * torch.randn(e.mean.shape, generator=draws) for e in examples])
    noise = _noise(session, latents.shape, draws)
    timesteps = timesteps_at(session, spread_places(len(examples), draws))
    dropped = torch.rand(len(examples), generator=draws) < session.run.dataset.caption_dropout
    perturbed = None
    if strength := session.run.objective.input_perturbation:
        perturbed = noise + strength * torch.randn(noise.shape, generator=draws)
    place = (microbatch, piece) if piece else (microbatch,)
    torch.manual_seed(seed_for(seed, "dropout", *place))  # the adapter's dropout draws from the global generator
    part = slice(piece * len(examples) // pieces, (piece + 1) * len(examples) // pieces)
    share = len(examples[part]) / len(examples)
    if not share:
        return torch.zeros((), requires_grad=True)  # more pieces than pictures
    step = microbatch // training.gradient_accumulation_steps + 1
    with torch.set_grad_enabled(session.learns("text_encoder", step)):
        conditioning = _conditioning(session, examples[part], dropped[part].tolist())
    batch = Batch(_scaled(session, latents[part]), conditioning, _size_ids(session, examples[part]))
    return _losses(session, batch, noise[part], timesteps[part], None if perturbed is None else perturbed[part]).mean() * share


def _noise(session: Session, shape: torch.Size, draws: torch.Generator) -> Tensor:
    settings = session.run.objective
    noise = pyramid_noise(torch.randn(shape, generator=draws), settings.pyramid_noise, draws)
    return offset_noise(noise, settings.noise_offset, draws, settings.noise_offset_random)


def _conditioning(session: Session, examples: Sequence[Example], dropped: Sequence[bool]) -> Conditioning:
    if session.no_caption is None:
        return session.encode(["" if drop else e.caption for e, drop in zip(examples, dropped, strict=True)])
    chosen = [session.no_caption if drop else e.conditioning for e, drop in zip(examples, dropped, strict=True)]
    return {name: torch.stack([c[name] for c in chosen]).to(session.device) for name in session.no_caption}


def _size_ids(session: Session, examples: Sequence[Example]) -> Tensor:
    return torch.tensor([e.size_ids for e in examples], dtype=torch.float32, device=session.device)


def _scaled(session: Session, latents: Tensor) -> Tensor:
    """As the denoiser knows them: around zero, with a spread of about one."""
    vae = session.base.pipe.vae.config
    return ((latents - (vae.shift_factor or 0)) * vae.scaling_factor).to(session.device)


def _losses(session: Session, batch: Batch, noise: Tensor, timesteps: Tensor, perturbed: Tensor | None = None) -> Tensor:
    """Of each picture, [B]. With `perturbed` noise in its place, the denoiser is still asked for `noise`."""
    noised = session.objective.noised(batch.latents, noise.to(session.device), timesteps)
    if perturbed is not None:
        seen = session.objective.noised(batch.latents, perturbed.to(session.device), timesteps)
        noised = replace(noised, noisy_latents=seen.noisy_latents)
    model_pred = session.base.family.predict(session.base.denoiser, noised, batch)
    return picture_losses(session.objective, model_pred, noised, session.run.objective)


@torch.no_grad()
def validation_loss(session: Session) -> float:
    """Mean loss over the held-out pictures at fixed noise and timesteps: the same weights always give the same number.

    The loss of a step depends mostly on its random timestep; only this one shows progress.
    """
    return float(torch.stack([measured_loss(session, example, index) for index, example in enumerate(session.held_out)]).mean())


@torch.no_grad()
def measured_loss(session: Session, example: Example, index: int = 0) -> Tensor:
    """Mean loss of one picture over fixed timesteps, with the noise of this index."""
    places = (torch.arange(VALIDATION_TIMESTEPS) + 0.5) / VALIDATION_TIMESTEPS
    timesteps = session.objective.timesteps(places.to(session.device))
    noise = torch.randn(VALIDATION_TIMESTEPS, *example.mean.shape, generator=generator_for(session.run.training.seed, "validation", index))
    conditioning, sizes = _conditioning(session, [example], [False]), _size_ids(session, [example])
    losses = []
    for part in torch.arange(VALIDATION_TIMESTEPS).chunk(session.ladder.pieces["validate"]):
        repeated = {name: t.expand(len(part), *t.shape[1:]) for name, t in conditioning.items()}
        batch = Batch(_scaled(session, example.mean.expand_as(noise[part])), repeated, sizes.expand(len(part), -1))
        losses.append(_losses(session, batch, noise[part], timesteps[part]))
    return torch.cat(losses).mean()
