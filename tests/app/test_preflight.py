"""Before the start: the estimate, the checks, and that each fix solves the problem it names."""

from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from app.actions import datasets, preflight, run_estimate
from app.jobs import device, runs
from app.server import create_app
from app.settings import form, own_presets
from app.tabs import train_actions, train_form
from trainer import config
from trainer.config import presets
from trainer.data import scan
from trainer.data.issue import Issue
from trainer.errors import ConfigError
from trainer.training import estimate

GB = 10**9


@pytest.fixture
def values(outputs) -> dict:
    """The form with an example dataset and the first preset."""
    name = datasets.add_example("subject")
    recipe = presets.load_preset("embedded-subject")
    shown = dict(
        zip(train_form.field_names(), train_form.show_settings(recipe.config), strict=True)
    )
    own = {
        "base": "embedded",
        "own_base": "",
        "preset": recipe.name,
        "dataset.folder": name,
        "name": "x",
        "dataset.trigger": "zorbit",
    }
    return {key: own.get(key, value) for key, value in shown.items()}


@pytest.fixture
def memory(monkeypatch):
    """Replaces the device by a GPU with a number of bytes."""

    def use(total: float) -> None:
        monkeypatch.setattr(device, "has_cuda", lambda: True)
        monkeypatch.setattr(device, "usage", lambda: device.Usage(int(total), 0, 0.0))

    return use


def fixes(view: dict) -> dict[str, dict]:
    return {each["cure"]["label"]: each["cure"] for each in view["checks"] if "cure" in each}


def test_the_estimate_shows_steps_time_and_memory(values) -> None:
    view = train_actions.summary(values)
    run = train_form.read_form(values)
    steps = estimate.steps_for(run, [1] * 12)
    assert (
        view["sum"] == "11 images × 100 views in batches of 4 = "
        and view["steps"] == f"{steps} steps"
        and steps == -(-11 * 100 // 4)
    )
    assert "roughly" in view["time"] and "learning rate 0.0015" in view["facts"][0]
    assert [phase["name"] for phase in view["memory"]["phases"]] == list(
        run_estimate.PHASES.values()
    ) and view["checks"] == []


def test_without_a_dataset_an_example_is_offered(values) -> None:
    view = train_actions.summary(values | {"dataset.folder": None})
    assert "steps" not in view and fixes(view)["Take an example"]["example"] == "subject"
    assert (
        train_actions.start(values | {"dataset.folder": None})["refused"] and runs.all_runs() == []
    )


def test_several_gpus_are_offered_only_if_the_machine_has_them(values, memory, monkeypatch) -> None:
    def is_shown() -> bool:
        with gr.Blocks():
            return train_form.advanced_widgets()[0]["training.devices"].visible

    memory(80 * GB)
    two = values | {"training.devices": 2}
    assert not is_shown() and fixes(train_actions.summary(two))["Use 1"]["changes"] == {
        "training.devices": 1
    }
    monkeypatch.setattr(device, "count", lambda: 2)
    assert is_shown() and "Use 2" not in fixes(train_actions.summary(two))
    one_way, other = (
        estimate.memory(train_form.read_form(shown), "cuda").step for shown in (values, two)
    )
    assert other < one_way


def test_a_cluster_can_train_what_this_machine_cannot(values, monkeypatch, outputs) -> None:
    wide = values | {"training.devices": 4, "base.quantization": "4bit"}
    monkeypatch.setattr(device, "trains_elsewhere", False)
    assert "Keep the base whole" in fixes(train_actions.summary(wide))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the application sets
    create_app(ray="http://head:8265")
    assert not any(each["level"] == "bad" for each in train_actions.summary(wide)["checks"])
    with gr.Blocks():
        assert train_form.advanced_widgets()[0]["training.devices"].visible


def test_the_memory_fix_makes_the_run_fit_and_keeps_the_batch(values, memory) -> None:
    big = values | {
        "base": train_form.SD15,
        "training.gradient_checkpointing": False,
        "training.batch_size": 8,
        "dataset.resolution": 512,
    }
    memory(80 * GB)
    assert "Fit to my device" not in fixes(train_actions.summary(big))
    memory(6 * GB)
    cure = fixes(train_actions.summary(big))["Fit to my device"]
    assert cure["changes"]["training.gradient_checkpointing"] is True
    mended = big | cure["changes"]
    assert (
        "Fit to my device" not in fixes(train_actions.summary(mended))
        and train_actions.summary(mended)["memory"]["fits"]
    )
    assert mended["training.batch_size"] * mended["training.gradient_accumulation_steps"] == 8


def test_a_wrong_setting_is_reset_by_one_click(values) -> None:
    view = train_actions.summary(values | {"adapter.rank": 0})
    assert view["checks"][0]["level"] == "bad" and fixes(view)["Reset it"]["reset"] == [
        "adapter.rank"
    ]
    updates = dict(
        zip(
            train_form.field_names(),
            train_actions.reset(
                SimpleNamespace(paths=["adapter.rank", "preset"]), values["preset"]
            ),
            strict=True,
        )
    )
    assert (
        updates["adapter.rank"] == 8
        and isinstance(updates["preset"], dict)
        and updates["training.steps"] == updates["preset"]
    )
    both = values | {"training.learning_rate": 0, "training.text_encoder_learning_rate": 0}
    assert "Back to the preset" in fixes(
        train_actions.summary(both)
    ) and "refused" in train_actions.start(both)


def test_a_run_that_would_fail_later_cannot_start(values, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    view = train_actions.start(
        values | {"base": train_form.OWN, "own_base": "nobody/no-such-model"}
    )
    assert "downloads are switched off" in view["checks"][0]["text"] and "refused" in view
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    full = train_actions.start(values)
    assert "refused" in full and fixes(full)["Keep one save"]["changes"] == {"saving.saves": 1}
    assert (
        "refused" in train_actions.start(values | {"base": train_form.OWN, "own_base": "/nowhere"})
        and runs.all_runs() == []
    )


def test_a_missing_tracker_package_is_reported_before_the_start(values, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    view = train_actions.start(values | {"saving.tracking": "wandb"})
    assert "refused" in view and fixes(view)["Do without"]["changes"] == {"saving.tracking": "none"}


def test_far_more_images_than_the_preset_is_for_need_fewer_views() -> None:
    recipe = presets.load_preset("sd15-subject")
    found = preflight._length_checks(recipe.config, 120, recipe)
    assert found[0]["cure"]["changes"] == {"training.views_per_picture": 25}
    assert preflight._length_checks(recipe.config, 30, recipe) == []


def items(count: int, side: int, caption: str = "a cat") -> list[scan.DatasetItem]:
    return [scan.DatasetItem(Path(f"{i}.png"), caption, side, side) for i in range(count)]


@pytest.mark.parametrize(
    ("side", "bucket_step", "suggested"),
    [(300, 64, 256), (300, 8, 296), (100, 8, 96), (60, 64, None)],
)
def test_small_images_suggest_a_resolution_in_bucket_steps(side, bucket_step, suggested) -> None:
    changes = {"dataset.resolution": 512, "dataset.bucket_step": bucket_step}
    run = config.replace(config.RunConfig(), changes)
    checks = preflight._size_checks(run, [*items(6, side), *items(5, 512)])
    found = [check["cure"]["changes"]["dataset.resolution"] for check in checks]
    assert found == ([suggested] if suggested else [])
    if suggested:
        config.replace(run, {"dataset.resolution": suggested})  # a valid setting
    assert preflight._size_checks(run, [*items(5, side), *items(6, 512)]) == []
    upscaled = config.replace(run, {"dataset.allow_upscale": True})
    assert preflight._size_checks(upscaled, items(6, side)) == []


def test_few_images_missing_captions_and_unusable_files_are_reported() -> None:
    run = config.RunConfig()
    issues = [Issue("a.png", "error", "x"), Issue("b.png", "note", "x")]
    checks = preflight._image_checks(run, items(4, 512, caption=" "), issues)
    assert [check["text"].split(":")[0].split(" have")[0] for check in checks] == [
        "Only 4 images",
        "4 of 4 images",
        "1 file cannot be used in training; the Dataset tab shows why.",
    ]
    assert {check["cure"]["go"] for check in checks} == {"dataset"}
    with_trigger = config.replace(run, {"dataset.trigger": "zorbit"})
    assert preflight._image_checks(with_trigger, items(5, 512, caption=""), []) == []


def test_a_run_that_fits_only_an_empty_gpu_gives_a_warning(values, monkeypatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "usage", lambda: device.Usage(80 * GB, 80 * GB - 1, 0.0))
    (check,) = train_actions.summary(values)["checks"]
    assert check["level"] == "warn"
    assert "are free now" in check["text"]
    monkeypatch.setattr(runs, "active", lambda: Path("a run"))
    assert train_actions.summary(values)["checks"] == [], (
        "the active run frees its memory when it ends"
    )


def test_settings_that_differ_from_the_preset_are_listed(values) -> None:
    assert train_actions.changes(values)["changed"] == []
    changed = train_actions.changes(
        values | {"adapter.rank": 24, "training.gradient_checkpointing": True}
    )["changed"]
    assert [(each["label"], each["was"], each["now"]) for each in changed] == [
        ("Network rank (dimension)", "8", "24"),
        ("Gradient checkpointing", "off", "on"),
    ]


def test_own_presets_are_saved_chosen_and_removed(values) -> None:
    radio, said = train_actions.save_preset("  My   faces ", values | {"adapter.rank": 24})
    name = radio.value
    assert (
        said["own"] and name == "own-My-faces" and own_presets.own()[name].config.adapter.rank == 24
    )
    assert own_presets.own()[name].config.dataset.folder == "" and name in [
        value for _, value in radio.choices
    ]
    assert train_form.choose_preset(name)[train_form.advanced_paths().index("adapter.rank")] == 24
    assert train_actions.start(values | {"preset": name}).get("refused") is None
    assert name not in [
        value for _, value in train_actions.remove_preset(values | {"preset": name})[0].choices
    ]
    with pytest.raises(ConfigError):
        own_presets.remove("embedded-subject")
    assert "problem" in train_actions.save_preset(" ", values)[1]


def test_an_own_preset_replaces_only_its_title_and_a_damaged_one_is_skipped(values) -> None:
    run = train_form.read_form(values)
    names = [own_presets.save(title, run) for title in ("My style!", "My style?", "My style!")]
    assert (
        names == ["own-My-style", "own-My-style-2", "own-My-style"] and len(own_presets.own()) == 2
    )
    for content in (b"[about", b"\xff"):
        (own_presets.folder() / "own-My-style.toml").write_bytes(content)
        assert list(own_presets.own()) == ["own-My-style-2"]
        assert (
            own_presets.save("My style!", run) == "own-My-style-3"
            and (own_presets.folder() / "own-My-style.toml").read_bytes() == content
        )
        own_presets.remove("own-My-style-3")


def test_exported_settings_fill_the_form_again(values) -> None:
    text = train_actions.export(values | {"adapter.rank": 24})["download"]["text"]
    run, _ = train_actions.read_settings(text, values)
    assert run == train_form.read_form(values | {"adapter.rank": 24})
    shown = dict(
        zip(
            ["tools", *train_form.field_names()],
            train_actions.take_settings(text, values),
            strict=True,
        )
    )
    assert shown["adapter.rank"] == 24 and shown["dataset.folder"].value == values["dataset.folder"]


def test_settings_of_another_trainer_fill_the_form(values) -> None:
    tools, *fields = train_actions.take_settings(
        '{"network_dim": 32, "network_alpha": 8, "learning_rate": 1e-4, "color_aug": true}', values
    )
    shown = dict(zip(train_form.field_names(), fields, strict=True))
    assert (
        shown["adapter.rank"] == 32
        and shown["adapter.alpha"] == 8
        and shown["dataset.trigger"] == "zorbit"
    )
    assert "kohya" in tools["said"] and "color_aug" in tools["said"]
    assert "contains no settings" in train_actions.take_settings('{"a": 1}', values)[0]["problem"]
    wrong = config.to_toml(train_form.read_form(values)).replace("\nrank = 8", "\nrank = -1")
    assert "adapter.rank" in train_actions.take_settings(wrong, values)[0]["problem"]


def test_values_on_buttons_are_shortened() -> None:
    assert [form.short_text(value) for value in (True, 1e-4, ("a", "b"), "x" * 99)] == [
        "on",
        "0.0001",
        "a\nb",
        "x" * 39 + "…",
    ]
