"""The requests of the Preview tab: several adapters, sheets, another base, other programs."""

import pytest

from app.jobs import previews, runs
from app.tabs import preview, preview_plans
from tests.browser import staged
from trainer.errors import TrainerError


@pytest.fixture
def values(outputs) -> dict:
    """The form for a run with five saves, and another run beside it."""
    first, second = (staged.stage(name, 100) for name in ("maya", "ink"))
    for folder in (first, second):
        staged.finish(folder)
    runs.all_runs.forget()
    return dict.fromkeys(preview.NAMES) | {
        "run": first.name,
        "save": "maya.safetensors",
        "prompt": "a zorbit",
        "seed": 3,
        "negative_prompt": "",
        "inference_steps": 8,
        "guidance_scale": 5.0,
        "sampler": "Euler a",
        "strength": 1.0,
        "second_strength": 0.6,
        "third_strength": 1.0,
        **dict.fromkeys(
            ("text_strength", "second_text_strength", "third_text_strength"), ""
        ),  # what an empty field sends
        "width": 0,
        "height": 0,
        "ink": f"{second.name}/ink.safetensors",
    }


def test_only_the_first_adapter_differs_from_the_base(values) -> None:
    (_, base), (_, adapted) = preview_plans.plan_compare(
        values | {"second": values["ink"], "second_text_strength": "0.2", "text_strength": "0.5"}
    )
    assert [(a.strength, a.text_strength) for a in base.adapters] == [(0.6, 0.2)]
    assert [(a.strength, a.text_strength) for a in adapted.adapters] == [(1.0, 0.5), (0.6, 0.2)]
    assert (
        adapted.adapters[0].file.endswith("maya.safetensors")
        and adapted.sampler == "Euler a"
        and previews.cache_key(base) != previews.cache_key(adapted)
    )
    alike = preview_plans.plan_compare(values | {"third": values["ink"]})[1][1]
    assert [(a.strength, a.text_strength) for a in alike.adapters] == [(1.0, None), (1.0, None)]
    with pytest.raises(TrainerError, match="is not a number"):
        preview_plans.plan_compare(values | {"text_strength": "much"})
    with pytest.raises(
        TrainerError, match="Second adapter, in the text encoder: much is not a number"
    ):
        preview_plans.plan_compare(
            values | {"second": values["ink"], "second_text_strength": "much"}
        )
    with pytest.raises(TrainerError, match="no longer exists"):
        preview_plans.plan_compare(values | {"third": "../../x/y.safetensors"})
    for wrong in ({"strength": None}, {"strength": 7}, {"seed": -5}, {"seed": 2**32}):
        with pytest.raises(TrainerError, match="(Strength|Seed) must be a number from 0 to"):
            preview_plans.plan_compare(values | wrong)


def test_a_sheet_is_save_by_strength_by_prompt(values) -> None:
    sheet = preview_plans.plan_sheet(values | {"sheet_prompts": "a cat\n\n a dog "})
    assert len(sheet) == 2 * 3 * 5 and {request.prompt for _, request in sheet} == {
        "a cat",
        "a dog",
    }
    assert {request.seed for _, request in sheet} == {3} and len(
        {previews.cache_key(request) for _, request in sheet}
    ) == 30
    with pytest.raises(TrainerError, match="at most"):
        preview_plans.plan_sheet(values | {"sheet_prompts": "\n".join("abcdefgh")})


def test_another_base_is_asked_for(values) -> None:
    assert (
        preview_plans.plan_compare(values | {"base": " someone/else "})[0][1].base.model
        == "someone/else"
    )


def test_how_to_get_it_elsewhere(values) -> None:
    a1111, comfy = preview_plans.other_programs(
        preview_plans.plan_compare(values | {"text_strength": " 0.5"})[1][1]
    )
    assert "<lora:maya:1>" in a1111 and "Euler a" in a1111 and "seed 3" in a1111
    assert "maya.safetensors (strength_model 1, strength_clip 0.5)" in comfy


def test_prompts_are_kept_once_and_the_latest_first(outputs) -> None:
    for text in ("a", "b", "a", " ", *map(str, range(40))):
        previews.keep_prompt(text)
    assert (
        previews.prompts()[:2] == ["39", "38"] and len(previews.prompts()) == previews.MAX_PROMPTS
    )
    (previews.folder() / "prompts.json").write_text("{broken")
    assert previews.prompts() == []


def test_whoever_looks_at_the_newest_save_goes_on_to_the_next(values) -> None:
    run, other = values["run"], f"{values['ink'].split('/')[0]}/x"
    newest = [("maya", f"{run}/maya.safetensors")]

    def shown(save: str, before: str) -> str:
        return preview.show_saves(run, save, newest, [("maya", f"{run}/{before}"), ("ink", other)])[
            0
        ].value

    assert shown("maya-000080.safetensors", before="maya-000080.safetensors") == "maya.safetensors"
    assert (
        shown("maya-000040.safetensors", before="maya-000080.safetensors")
        == "maya-000040.safetensors"
    ), "chosen by hand"
    assert shown("gone.safetensors", before="maya-000080.safetensors") == "maya.safetensors"
    assert preview.show_saves("gone", "x", newest, [])[1] == newest
