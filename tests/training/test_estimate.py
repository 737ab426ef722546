"""What a run will take: steps, parameters, disk, memory and time."""

import importlib.util
from pathlib import Path

import pytest

from trainer import config
from trainer.config import RunConfig, presets
from trainer.models import pipelines
from trainer.runs import events, run_status
from trainer.training import estimate

RECORDED = Path(__file__).parents[1] / "recorded"
SD15, SDXL = (presets.load_preset(name).config for name in ("sd15-subject", "sdxl-subject"))


def changed(run: RunConfig, **changes: object) -> RunConfig:
    """Returns a run with changes by dotted path, in which "__" replaces the dot."""
    return config.replace(run, {name.replace("__", "."): value for name, value in changes.items()})


def step_bytes(run: RunConfig, device: str = "cuda", **changes: object) -> float:
    return estimate.memory(changed(run, **changes), device).step


# Steps


@pytest.mark.parametrize(
    ("images", "fraction", "trained"),
    [(20, 0.1, 18), (13, 0.15, 11), (17, 0.15, 14), (11, 0.14, 9), (9, 0.5, 9)],
)
def test_steps_leave_out_a_validation_set_of_rounded_size(
    images: int, fraction: float, trained: int
) -> None:
    """13 x 0.15 = 1.95 images are 2. A dataset of fewer than 10 images has no validation set."""
    run = changed(
        SD15,
        training__steps=0,
        training__views_per_picture=1,
        training__batch_size=1,
        dataset__hold_out=fraction,
    )
    assert estimate.steps_for(run, [1] * images) == trained


def test_steps_round_the_repeats_outside_the_validation_set() -> None:
    """25 repeats of 12 images, of which 2 are for validation, are 25 x 10 / 12 = 20.8 views."""
    run = changed(
        SD15,
        training__steps=0,
        training__views_per_picture=1,
        training__batch_size=1,
        dataset__hold_out=0.15,
    )
    assert estimate.steps_for(run, [3, *[2] * 11]) == 21


def test_repeats_do_not_enlarge_the_validation_set() -> None:
    run = changed(SD15, training__steps=0, training__views_per_picture=1, training__batch_size=1)
    assert estimate.steps_for(run, [10] * 8) == 80
    larger = changed(run, dataset__resolutions=[768])
    assert estimate.steps_for(larger, [10] * 8) == 160


@pytest.mark.parametrize(
    ("total", "saves", "steps"),
    [(6, 2, [3, 6]), (10, 3, [3, 7, 10]), (2, 5, [1, 2]), (1, 1, [1]), (100, 4, [25, 50, 75, 100])],
)
def test_saves_divide_the_run_into_equal_parts(total: int, saves: int, steps: list[int]) -> None:
    assert estimate.save_steps(total, saves) == steps


# Time


@pytest.mark.parametrize("recording", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_seconds_left_is_within_15_percent_after_a_tenth(recording: Path) -> None:
    """At each tenth of the run except the last."""
    happened = list(events.read_events(recording))
    status, end = run_status.RunStatus(name="recorded"), happened[-1].time
    checked = []
    for event in happened:
        run_status.apply_event(status, event)
        if not isinstance(event, events.StepDone) or event.step == status.total_steps:
            continue
        if event.step % (status.total_steps // 10) == 0:
            left = end - event.time
            checked.append(event.step)
            assert abs(status.seconds_left - left) <= max(1, 0.15 * left), event.step
    assert len(checked) == 9


def test_a_pause_does_not_count_as_validation_time() -> None:
    status = run_status.RunStatus(name="x")
    started = events.Started(
        0, 10, 1, 0, 1, "cpu", "fp32", "torch", "x", saves=2, images_per_step=4, time=0
    )
    for event in (
        started,
        events.Validated(0, 1.0, time=1),
        events.StepDone(1, 1.0, 1e-4, 0.5, time=3),
        events.Validated(1, 1.0, time=4),
        events.Paused(1, time=4),
        events.Continued(1, time=1000),
        events.StepDone(2, 1.0, 1e-4, 0.5, time=1000.5),
    ):
        run_status.apply_event(status, event)
    assert status.images_per_second == 8
    assert status.seconds_left == 8 * 0.5 + 2 * 2.5


def test_expected_seconds_grow_with_the_work() -> None:
    seconds = estimate.expected_seconds_per_step
    assert seconds(SD15, "cuda") < seconds(SDXL, "cuda") < seconds(SDXL, "cpu", 4)
    assert seconds(SDXL, "cpu", 4) < seconds(SDXL, "cpu", 1)
    assert seconds(changed(SD15, training__batch_size=8), "cpu") > 2 * seconds(SD15, "cpu")


def test_class_images_prior_preservation_and_more_resolutions_cost_time() -> None:
    run = changed(SD15, dataset__trigger="x")

    def seconds(**changes: object) -> float:
        return estimate.expected_seconds_per_step(changed(run, **changes), "cuda")

    class_images = {"dataset__regularisation_folder": "x"}
    prior = {"objective__prior_preservation": 1.0}
    plain = seconds()
    with_one, with_both = seconds(**class_images), seconds(**class_images, **prior)
    assert seconds(**prior) == with_one > plain
    assert with_both - with_one == pytest.approx(with_one - plain)
    assert estimate.passes_per_image(changed(run, **class_images, **prior)) == 3
    larger = {"dataset__resolution": 768}
    assert plain < seconds(dataset__resolutions=[768]) < seconds(**larger)

    # One is differentiated before the next, so they need no more memory.
    assert step_bytes(run, **class_images, **prior) == step_bytes(run)
    assert step_bytes(run, dataset__resolutions=[768]) == step_bytes(run, **larger)


# Disk


def test_disk_space_counts_every_cached_view(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    run = changed(SD15, dataset__folder=str(tmp_path))

    def added(**changes: object) -> float:
        return estimate.disk_bytes(changed(run, **changes)) - estimate.disk_bytes(run)

    second_view = added(dataset__flip=True)
    assert second_view > 0
    eight_views = {"dataset__flip": True, "dataset__random_crop": True, "dataset__variants": 4}
    assert added(**eight_views) == pytest.approx(7 * second_view)


def test_disk_space_counts_three_checkpoints_and_every_save() -> None:
    """Checkpoints contain the weight and two moments in float32, and a moving average."""
    run = changed(RunConfig(), saving__precision="fp16", sampling__prompts=["a", "b"])
    parameters = estimate.trainable_parameters(run)
    assert parameters
    with_average = changed(run, training__ema_decay=0.9)
    average_bytes = estimate.disk_bytes(with_average) - estimate.disk_bytes(run)
    assert average_bytes == 3 * 4 * parameters
    one_more_save = changed(run, saving__saves=run.saving.saves + 1)
    sample_bytes = 2 * run.dataset.resolution**2 * 3
    save_bytes = estimate.disk_bytes(one_more_save) - estimate.disk_bytes(run)
    assert save_bytes == 2 * parameters + sample_bytes


# Memory


def test_every_pipeline_has_costs() -> None:
    assert set(estimate.COSTS) == set(pipelines.PIPELINES)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_memory_grows_with_batch_rank_and_resolution(device: str) -> None:
    def step(run: RunConfig, **changes: object) -> float:
        return step_bytes(run, device, **changes)

    whole = changed(SD15, training__gradient_checkpointing=False)
    assert step(whole, training__batch_size=4) > step(whole)
    assert step(whole, adapter__rank=256) > step(whole)
    assert step(whole, training__gradient_checkpointing=True) < step(whole)
    assert step(SD15, dataset__resolution=768) > step(SD15)
    assert step(SDXL) > step(SD15)


def test_samples_need_the_most_memory_of_sdxl() -> None:
    assert estimate.memory(SDXL, "cuda").worst == "sample"
    assert estimate.memory(SDXL, "cpu").peak > estimate.memory(SDXL, "cuda").peak


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_adapter_needs_16_bytes_per_parameter(device: str) -> None:
    """Weight, gradient and two moments, in float32. The embedded base is counted exactly."""
    small, large = (changed(RunConfig(), adapter__rank=rank) for rank in (4, 68))
    small_count, large_count = map(estimate.trainable_parameters, (small, large))
    assert small_count and large_count
    added = step_bytes(large, device) - step_bytes(small, device)
    assert added == pytest.approx(16 * (large_count - small_count))


def test_activations_of_sd15_are_those_counted() -> None:
    """0.80 GB for one 512-pixel image in bf16 (docs/estimates.md)."""
    run = changed(
        SD15,
        training__gradient_checkpointing=False,
        training__text_encoder_learning_rate=0,
    )
    one, two = (step_bytes(run, training__batch_size=size) for size in (1, 2))
    assert (two - one) / estimate.FRAGMENTATION == pytest.approx(0.80e9, rel=0.02)


@pytest.mark.parametrize(
    ("model", "resolution", "batch_size", "checkpointing", "measured"),
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
    run = changed(
        RunConfig(),
        base__model=model,
        dataset__resolution=resolution,
        adapter__rank=16,
        training__batch_size=batch_size,
        training__gradient_checkpointing=checkpointing,
    )
    assert step_bytes(run) / 2**30 == pytest.approx(measured, rel=0.1)


def test_text_encoders_count_only_if_they_stay_on_the_gpu() -> None:
    """They leave it if all texts are encoded before the training."""

    def sample_bytes(**changes: object) -> float:
        return estimate.memory(changed(SDXL, **changes), "cuda").sample

    changing_captions = sample_bytes(dataset__shuffle_tags=True)
    assert changing_captions - sample_bytes() == pytest.approx((123e6 + 695e6) * 2)
    assert sample_bytes(training__text_encoder_learning_rate=1e-5) == changing_captions


def test_only_linear_layers_shrink_by_quantisation() -> None:
    run = changed(SDXL, base__precision="bf16")
    whole, in_8_bits, in_4_bits = (
        step_bytes(run, base__quantization=bits) for bits in ("none", "8bit", "4bit")
    )
    linear = 0.87 * 2567e6
    assert whole - in_8_bits == pytest.approx(linear, rel=0.01)
    assert whole - in_4_bits == pytest.approx(linear * 1.48, rel=0.01)


# Fitting a run to a GPU


def test_fit_changes_as_little_as_needed() -> None:
    run = changed(SD15, training__batch_size=4, training__gradient_checkpointing=False)
    assert estimate.fit(run, "cuda", 80e9) == {}
    peak = estimate.memory(run, "cuda").peak
    assert estimate.fit(run, "cuda", peak - 1) == {"training.gradient_checkpointing": True}
    fitted = config.replace(run, estimate.fit(run, "cuda", 1e9)).training
    assert (fitted.batch_size, fitted.gradient_accumulation_steps) == (1, 4), (
        "the effective batch stays the same"
    )
    in_fp32 = changed(run, base__precision="fp32")
    assert estimate.fit(in_fp32, "cuda", 1e9)["base.precision"] == "auto"


def test_fit_tiles_samples_and_quantises_the_base_if_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak = estimate.memory(SDXL, "cuda").peak
    assert estimate.fit(SDXL, "cuda", peak - 1) == {"sampling.vae_tiling": True}
    # Without bitsandbytes, a quantised run would be refused.
    assert "base.quantization" not in estimate.fit(SDXL, "cuda", 1e9)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes")
    changes = estimate.fit(SDXL, "cuda", 7e9)
    assert changes == {"sampling.vae_tiling": True, "base.quantization": "8bit"}
    assert estimate.fit(SDXL, "cuda", 1e9)["base.quantization"] == "4bit"
    dora = changed(SDXL, adapter__kind="dora")
    assert "base.quantization" not in estimate.fit(dora, "cuda", 1e9)


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("sd15-small-gpu", 4), ("sdxl-small-gpu", 8), ("sd35m-small-gpu", 12)]
)
def test_presets_for_small_gpus_fit_them(name: str, gigabytes: int) -> None:
    """Within the fraction of memory that the page plans with. The usual preset does not fit."""
    small = presets.load_preset(name)
    usual = presets.load_preset(name.replace("small-gpu", "subject"))
    available = 0.94e9 * gigabytes
    assert f"{gigabytes} GB" in small.purpose
    assert estimate.memory(small.config, "cuda").peak <= available
    assert estimate.memory(usual.config, "cuda").peak > available
