"""Trains an adapter from Python, cell by cell (`# %%` is read by Jupyter, VS Code and others), and draws with it.

On the built-in base and its example pictures this takes some three minutes on a CPU.
The lines with a word in comments say what to change for pictures and a base of your own.
"""

# %% The settings: a recipe, and what differs from it. `python -m trainer train --help` lists them all.
from trainer import RunConfig, run
from trainer.cli.demo_report import EXAMPLE
from trainer.config import replace
from trainer.config.presets import load_preset
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter
from trainer.runs.events import StepDone

recipe = load_preset("embedded-subject").config  # "sd15-subject", "sdxl-style" ... on a GPU
config: RunConfig = replace(
    recipe,
    {
        "name": "zorbit",
        "dataset.folder": str(EXAMPLE),  # or "my-pictures"
        "dataset.trigger": "zorbit",
        "training.steps": 300,
        # "base.model": "my-checkpoint.safetensors",
    },
)

# %% Training. Each event of trainer/events.py comes by; Ctrl-C saves and ends, `run(result.folder)` goes on.
losses = []


def watch(event):
    if isinstance(event, StepDone):
        losses.append(event.loss)
        if event.step % 50 == 0:
            print(f"step {event.step}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")


result = run(config, progress=watch)
print(result.status.state, "after", result.status.step, "steps:", result.adapter)

# %% Base and adapter side by side, on the same seed.
sampler = Sampler()
for strength in (0.0, 0.8):
    picture = SampleRequest(
        prompt="a zorbit on a green background",
        target=f"zorbit-{strength:g}.png",
        base=config.base,
        adapters=[StackedAdapter(str(result.adapter), strength)],
        guidance_scale=config.sampling.guidance_scale,
    )
    print(sampler.render(picture))
