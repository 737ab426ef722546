"""What is said before and during a run: memory by phase, the cures that make it fit, and the time that is left."""

import importlib.util
from pathlib import Path

import pytest

from trainer import config
from trainer.config import presets
from trainer.data.scan import held_out_count
from trainer.models import pipelines
from trainer.runs import events, run_status
from trainer.training import estimate

RECORDED = Path(__file__).parents[1] / "recorded"
SD15, SDXL = (presets.load_preset(name).config for name in ("sd15-subject", "sdxl-subject"))


@pytest.mark.parametrize("recording", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_seconds_left_is_within_15_percent_after_a_tenth(recording: Path) -> None:
    """Within 15 % at a tenth of the run, and at every later tenth until the last."""
    happened = list(events.read_events(recording))
    status, end = run_status.RunStatus(name="recorded"), happened[-1].time
    checked = []
    for event in happened:
        run_status._apply(status, event)
        if (
            isinstance(event, events.StepDone)
            and event.step % (status.total_steps // 10) == 0
            and event.step < status.total_steps
        ):
            left = end - event.time
            checked.append(event.step)
            assert (
                abs(status.seconds_left - left) <= 0.15 * left
                or abs(status.seconds_left - left) < 1
            ), event.step
    assert len(checked) == 9


def test_a_pause_does_not_count_as_validation_time() -> None:
    status = run_status.RunStatus(name="x")
    started = events.Started(
        0, 10, 1, 0, 1, "cpu", "fp32", "torch", "x", saves=2, images_per_step=4, time=0
    )
    for event in (
        started, events.Validated(0, 1.0, time=1), events.StepDone(1, 1.0, 1e-4, 0.5, time=3), events.Validated(1, 1.0, time=4),
        events.Paused(1, time=4), events.Continued(1, time=1000), events.StepDone(2, 1.0, 1e-4, 0.5, time=1000.5),
    ):  # fmt: skip
        run_status._apply(status, event)
    assert status.seconds_between_steps == [2.5] and status.images_per_second == 8
    assert status.seconds_left == 8 * 0.5 + 2 * 2.5


def test_every_pipeline_has_costs() -> None:
    assert set(estimate.COSTS) == set(pipelines.PIPELINES)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_memory_grows_with_batch_rank_and_resolution(device: str) -> None:
    def step(run: config.RunConfig, **changes) -> float:
        return estimate.memory(
            config.replace(
                run, {name.replace("__", "."): value for name, value in changes.items()}
            ),
            device,
        ).step

    plain = step(SD15, training__gradient_checkpointing=False)
    assert step(SD15, training__gradient_checkpointing=False, training__batch_size=4) > plain
    assert (
        step(SD15, training__gradient_checkpointing=True)
        < plain
        < step(SD15, training__gradient_checkpointing=False, adapter__rank=256)
    )
    assert step(SD15, dataset__resolution=768) > step(SD15) < step(SDXL)
    assert (
        estimate.memory(SDXL, "cuda").worst == "sample"
        and estimate.memory(SDXL, "cpu").peak > estimate.memory(SDXL, "cuda").peak
    )


def test_class_images_prior_preservation_and_more_resolutions_cost_time() -> None:
    def needs(**changes) -> tuple[float, float, float]:
        run = config.replace(
            SD15,
            {"dataset.trigger": "x"}
            | {name.replace("__", "."): value for name, value in changes.items()},
        )
        return (
            estimate.memory(run, "cuda").step,
            estimate.expected_seconds_per_step(run, "cuda"),
            estimate.passes_per_image(run),
        )

    plain = needs()
    beside = {"dataset__regularisation_folder": "x"}, {"objective__prior_preservation": 1.0}
    one, both = [needs(**changes) for changes in beside], needs(**beside[0], **beside[1])
    assert one[0] == one[1] and one[0][2] == 2 and both[2] == 3
    assert both[0] == one[0][0] == plain[0], "one is differentiated before the next"
    assert both[1] - one[0][1] == pytest.approx(one[0][1] - plain[1]) != 0
    assert needs(dataset__resolutions=[768])[0] == needs(dataset__resolution=768)[0]
    assert plain[1] < needs(dataset__resolutions=[768])[1] < needs(dataset__resolution=768)[1]


def test_repeats_do_not_enlarge_the_validation_set() -> None:
    run = config.replace(
        SD15, {"training.steps": 0, "training.views_per_picture": 1, "training.batch_size": 1}
    )
    assert (
        estimate.steps_for(run, [10] * 8) == 80
        and estimate.steps_for(run, [1] * 20) == 20 - held_out_count(run, 20) < 20
    )
    assert estimate.steps_for(config.replace(run, {"dataset.resolutions": [768]}), [10] * 8) == 160


def test_disk_space_counts_every_cached_view(tmp_path) -> None:
    (tmp_path / "a.png").touch()
    run = config.replace(SD15, {"dataset.folder": str(tmp_path)})
    cached = [
        estimate.disk_bytes(config.replace(run, changes)) - estimate.disk_bytes(run)
        for changes in (
            {"dataset.flip": True},
            {"dataset.flip": True, "dataset.random_crop": True, "dataset.variants": 4},
        )
    ]
    assert cached[1] == pytest.approx(7 * cached[0]) and cached[0] > 0


def test_activations_of_sd15_are_those_counted() -> None:
    """0.80 GB of activations for one 512-pixel picture in bf16, 0.21 GB with checkpointing (docs/estimates.md)."""
    runs = [config.replace(SD15, {"training.batch_size": n, "training.gradient_checkpointing": False,
                                  "training.text_encoder_learning_rate": 0}) for n in (1, 2)]  # fmt: skip
    one, two = (estimate.memory(run, "cuda").step for run in runs)
    assert (two - one) / estimate.FRAGMENTATION == pytest.approx(0.80e9, rel=0.02)


def test_fit_changes_as_little_as_needed() -> None:
    run = config.replace(SD15, {"training.batch_size": 4, "training.gradient_checkpointing": False})
    assert estimate.fit(run, "cuda", 80e9) == {}
    peak = estimate.memory(run, "cuda").peak
    assert estimate.fit(run, "cuda", peak - 1) == {"training.gradient_checkpointing": True}
    changes = estimate.fit(run, "cuda", 1e9)
    fitted = config.replace(run, changes).training
    assert (fitted.batch_size, fitted.gradient_accumulation_steps) == (1, 4), (
        "the optimiser sees the same batch"
    )
    assert (
        estimate.fit(config.replace(run, {"base.precision": "fp32"}), "cuda", 1e9)["base.precision"]
        == "auto"
    )


def test_fit_tiles_samples_and_quantises_the_base_if_that_helps(monkeypatch) -> None:
    peak = estimate.memory(SDXL, "cuda").peak
    assert estimate.fit(SDXL, "cuda", peak - 1) == {"sampling.vae_tiling": True}, (
        "samples are what takes most"
    )
    assert "base.quantization" not in estimate.fit(SDXL, "cuda", 1e9), (
        "without the package a run would be refused"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes")
    assert estimate.fit(SDXL, "cuda", 7e9) == {
        "sampling.vae_tiling": True,
        "base.quantization": "8bit",
    }
    assert estimate.fit(SDXL, "cuda", 1e9)["base.quantization"] == "4bit"
    assert "base.quantization" not in estimate.fit(
        config.replace(SDXL, {"adapter.kind": "dora"}), "cuda", 1e9
    )


@pytest.mark.parametrize(
    "name, card", [("sd15-small-gpu", 4), ("sdxl-small-gpu", 8), ("sd35m-small-gpu", 12)]
)
def test_presets_for_small_gpus_fit_them(name: str, card: int) -> None:
    """With the share of the card that the page plans with; the recipe they are made from does not."""
    small, large = (
        presets.load_preset(each) for each in (name, name.replace("small-gpu", "subject"))
    )
    assert f"{card} GB" in small.purpose
    assert (
        estimate.memory(small.config, "cuda").peak
        <= 0.94e9 * card
        < estimate.memory(large.config, "cuda").peak
    )


def test_text_encoders_count_only_if_they_stay_on_the_gpu() -> None:
    def sampling(**changes) -> float:
        return estimate.memory(
            config.replace(
                SDXL, {name.replace("__", "."): value for name, value in changes.items()}
            ),
            "cuda",
        ).sample

    assert sampling(dataset__shuffle_tags=True) - sampling() == pytest.approx((123e6 + 695e6) * 2)
    assert sampling(training__text_encoder_learning_rate=1e-5) == sampling(
        dataset__shuffle_tags=True
    )


def test_expected_seconds_grow_with_the_work() -> None:
    seconds = estimate.expected_seconds_per_step
    assert (
        seconds(SD15, "cuda")
        < seconds(SDXL, "cuda")
        < seconds(SDXL, "cpu", 4)
        < seconds(SDXL, "cpu", 1)
    )
    assert seconds(config.replace(SD15, {"training.batch_size": 8}), "cpu") > 2 * seconds(
        SD15, "cpu"
    )


@pytest.mark.parametrize(
    "model, resolution, batch_size, checkpointing, measured",
    [
        ("x/stable-diffusion-v1-5", 512, 1, False, 3.1),
        ("x/stable-diffusion-v1-5", 512, 8, False, 8.3),
        ("x/sdxl", 1024, 1, False, 11.3),
        ("x/sdxl", 1024, 1, True, 6.6),
        ("x/sdxl", 1024, 4, False, 27.1),
        ("x/stable-diffusion-3.5-medium", 1024, 4, False, 35.1),
    ],
)
def test_step_memory_is_within_10_percent_of_an_h200(
    model: str, resolution: int, batch_size: int, checkpointing: bool, measured: float
) -> None:
    """GiB allocated at the peak of benchmarks/step.py, in bf16 (docs/performance.md)."""
    training = {"training.batch_size": batch_size, "training.gradient_checkpointing": checkpointing}
    run = config.replace(
        config.RunConfig(),
        {"base.model": model, "dataset.resolution": resolution, "adapter.rank": 16, **training},
    )
    assert estimate.memory(run, "cuda").step / 2**30 == pytest.approx(measured, rel=0.1)


def test_only_linear_layers_shrink_by_quantisation() -> None:
    def step(how: str) -> float:
        return estimate.memory(
            config.replace(SDXL, {"base.quantization": how, "base.precision": "bf16"}), "cuda"
        ).step

    assert step("none") - step("8bit") == pytest.approx(0.87 * 2567e6, rel=0.01)
    assert step("none") - step("4bit") == pytest.approx(0.87 * 2567e6 * 1.48, rel=0.01)
