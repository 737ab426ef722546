"""Trains an adapter from Python and makes samples with it.

Jupyter, VS Code and others can run it cell by cell (`# %%`). With the built-in base and its example
images it takes about three minutes on a CPU. The comments show what to change for your images and
your base.
"""

# %% The settings: a preset and changes to it. `python -m trainer train --help` lists all.
from trainer import RunConfig, run
from trainer.cli.demo_report import EXAMPLE
from trainer.config import replace
from trainer.config.presets import load_preset
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter
from trainer.runs.events import StepDone

preset = load_preset("embedded-subject").config  # "sd15-subject", "sdxl-style" ... on a GPU
config: RunConfig = replace(
    preset,
    {
        "name": "zorbit",
        "dataset.folder": str(EXAMPLE),  # or "my-pictures"
        "dataset.trigger": "zorbit",
        "training.steps": 300,
        # "base.model": "my-checkpoint.safetensors",
    },
)

# %% Training. `watch` receives each event of trainer/runs/events.py. Ctrl-C saves and stops
# the run, and `run(result.folder)` continues it.
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
    request = SampleRequest(
        prompt="a zorbit on a green background",
        target=f"zorbit-{strength:g}.png",
        base=config.base,
        adapters=[StackedAdapter(str(result.adapter), strength)],
        guidance_scale=config.sampling.guidance_scale,
    )
    print(sampler.render(request))
