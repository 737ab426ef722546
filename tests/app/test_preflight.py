"""Before the start: the line is right, what stands in the way is said, and each cure mends what it says."""

from types import SimpleNamespace

import gradio as gr
import pytest

from app.actions import datasets, preflight, run_estimate
from app.jobs import device, runs
from app.server import create_app
from app.settings import form, own_presets
from app.tabs import train
from trainer import config
from trainer.config import presets
from trainer.errors import ConfigError
from trainer.training import estimate

GB = 10**9


@pytest.fixture
def values(outputs) -> dict:
    """The form as a newcomer leaves it: an example, and the first recipe."""
    name = datasets.add_example("subject")
    recipe = presets.load_preset("embedded-subject")
    shown = dict(zip(train._field_names(), train.show_settings(recipe.config), strict=True))
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
    """Sets the device to a GPU of so many bytes."""

    def use(total: float) -> None:
        monkeypatch.setattr(device, "has_cuda", lambda: True)
        monkeypatch.setattr(device, "usage", lambda: device.Usage(int(total), 0, 0.0))

    return use


def cures(view: dict) -> dict[str, dict]:
    return {each["cure"]["label"]: each["cure"] for each in view["checks"] if "cure" in each}


def test_the_line_says_what_the_run_will_do(values) -> None:
    view = train.summary(values)
    run = train._read(values)
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


def test_without_pictures_it_offers_them(values) -> None:
    view = train.summary(values | {"dataset.folder": None})
    assert "steps" not in view and cures(view)["Take an example"]["example"] == "subject"
    assert train.start(values | {"dataset.folder": None})["refused"] and runs.all_runs() == []


def test_several_gpus_are_offered_where_they_are(values, memory, monkeypatch) -> None:
    def is_shown() -> bool:
        with gr.Blocks():
            return train._advanced_form()[0]["training.devices"].visible

    memory(80 * GB)
    two = values | {"training.devices": 2}
    assert not is_shown() and cures(train.summary(two))["Use 1"]["changes"] == {
        "training.devices": 1
    }
    monkeypatch.setattr(device, "count", lambda: 2)
    assert is_shown() and "Use 2" not in cures(train.summary(two))
    one_way, other = (estimate.memory(train._read(shown), "cuda").step for shown in (values, two))
    assert other < one_way


def test_what_this_machine_lacks_does_not_stand_in_the_way_of_a_cluster(
    values, monkeypatch, outputs
) -> None:
    wide = values | {"training.devices": 4, "base.quantization": "4bit"}
    monkeypatch.setattr(device, "trains_elsewhere", False)
    assert "Keep the base whole" in cures(train.summary(wide))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the application sets
    create_app(ray="http://head:8265")
    assert not any(each["level"] == "bad" for each in train.summary(wide)["checks"])
    with gr.Blocks():
        assert train._advanced_form()[0]["training.devices"].visible


def test_fit_to_my_device_fits(values, memory) -> None:
    big = values | {
        "base": train.SD15,
        "training.gradient_checkpointing": False,
        "training.batch_size": 8,
        "dataset.resolution": 512,
    }
    memory(80 * GB)
    assert "Fit to my device" not in cures(train.summary(big))
    memory(6 * GB)
    cure = cures(train.summary(big))["Fit to my device"]
    assert cure["changes"]["training.gradient_checkpointing"] is True
    mended = big | cure["changes"]
    assert (
        "Fit to my device" not in cures(train.summary(mended))
        and train.summary(mended)["memory"]["fits"]
    )
    assert mended["training.batch_size"] * mended["training.gradient_accumulation_steps"] == 8


def test_a_fault_is_reset_by_one_click(values) -> None:
    view = train.summary(values | {"adapter.rank": 0})
    assert view["checks"][0]["level"] == "bad" and cures(view)["Reset it"]["reset"] == [
        "adapter.rank"
    ]
    updates = dict(
        zip(
            train._field_names(),
            train.reset(SimpleNamespace(paths=["adapter.rank", "preset"]), values["preset"]),
            strict=True,
        )
    )
    assert (
        updates["adapter.rank"] == 8
        and isinstance(updates["preset"], dict)
        and updates["training.steps"] == updates["preset"]
    )
    both = values | {"training.learning_rate": 0, "training.text_encoder_learning_rate": 0}
    assert "Back to the recipe" in cures(train.summary(both)) and "refused" in train.start(both)


def test_nothing_starts_that_must_fail_late(values, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    view = train.start(values | {"base": train.OWN, "own_base": "nobody/no-such-model"})
    assert "downloads are switched off" in view["checks"][0]["text"] and "refused" in view
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    full = train.start(values)
    assert "refused" in full and cures(full)["Keep one save"]["changes"] == {"saving.saves": 1}
    assert (
        "refused" in train.start(values | {"base": train.OWN, "own_base": "/nowhere"})
        and runs.all_runs() == []
    )


def test_a_tracker_that_is_not_there_is_told_before(values, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    view = train.start(values | {"saving.tracking": "wandb"})
    assert "refused" in view and cures(view)["Do without"]["changes"] == {"saving.tracking": "none"}


def test_many_pictures_are_seen_less_often() -> None:
    recipe = presets.load_preset("sd15-subject")
    found = preflight._length_checks(recipe.config, 120, recipe)
    assert found[0]["cure"]["changes"] == {"training.views_per_picture": 25}
    assert preflight._length_checks(recipe.config, 30, recipe) == []


def test_what_was_changed_is_listed(values) -> None:
    assert train.changes(values)["changed"] == []
    changed = train.changes(values | {"adapter.rank": 24, "training.gradient_checkpointing": True})[
        "changed"
    ]
    assert [(each["label"], each["was"], each["now"]) for each in changed] == [
        ("Network rank (dimension)", "8", "24"),
        ("Gradient checkpointing", "off", "on"),
    ]


def test_own_recipes_are_kept_chosen_and_removed(values) -> None:
    radio, said = train.save_recipe("  My   faces ", values | {"adapter.rank": 24})
    name = radio.value
    assert (
        said["own"] and name == "own-My-faces" and own_presets.own()[name].config.adapter.rank == 24
    )
    assert own_presets.own()[name].config.dataset.folder == "" and name in [
        value for _, value in radio.choices
    ]
    assert train.choose_recipe(name)[train.advanced_paths().index("adapter.rank")] == 24
    assert train.start(values | {"preset": name}).get("refused") is None
    assert name not in [
        value for _, value in train.remove_recipe(values | {"preset": name})[0].choices
    ]
    with pytest.raises(ConfigError):
        own_presets.remove("embedded-subject")
    assert "problem" in train.save_recipe(" ", values)[1]


def test_of_ones_own_recipes_no_other_is_replaced_and_a_damaged_one_is_left_out(values) -> None:
    run = train._read(values)
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


def test_settings_go_out_and_come_back(values) -> None:
    text = train.export(values | {"adapter.rank": 24})["download"]["text"]
    run, _ = train.read_settings(text, values)
    assert run == train._read(values | {"adapter.rank": 24})
    shown = dict(
        zip(["tools", *train._field_names()], train.take_settings(text, values), strict=True)
    )
    assert shown["adapter.rank"] == 24 and shown["dataset.folder"].value == values["dataset.folder"]


def test_settings_of_another_trainer_fill_the_form(values) -> None:
    tools, *fields = train.take_settings(
        '{"network_dim": 32, "network_alpha": 8, "learning_rate": 1e-4, "color_aug": true}', values
    )
    shown = dict(zip(train._field_names(), fields, strict=True))
    assert (
        shown["adapter.rank"] == 32
        and shown["adapter.alpha"] == 8
        and shown["dataset.trigger"] == "zorbit"
    )
    assert "kohya" in tools["said"] and "color_aug" in tools["said"]
    assert "contains no settings" in train.take_settings('{"a": 1}', values)[0]["problem"]
    wrong = config.to_toml(train._read(values)).replace("\nrank = 8", "\nrank = -1")
    assert "adapter.rank" in train.take_settings(wrong, values)[0]["problem"]


def test_values_are_short_enough_for_a_button() -> None:
    assert [form.short_text(value) for value in (True, 1e-4, ("a", "b"), "x" * 99)] == [
        "on",
        "0.0001",
        "a\nb",
        "x" * 39 + "…",
    ]
