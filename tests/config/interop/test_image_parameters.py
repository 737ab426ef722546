"""The generation parameters of an image fill the fields of the samples."""

from tests.config.interop.helpers import carry_over, values


def test_prompts_and_the_last_line_are_read():
    text = (
        "a cat, sitting\n"
        "Negative prompt: fog, rain\n"
        "Steps: 12, Sampler: Euler a, CFG scale: 4.5, Seed: 9, Size: 512x512"
    )
    run, unsupported = carry_over({"parameters": text})
    expected = {
        "sampling.prompts": ("a cat, sitting",),
        "sampling.negative_prompt": "fog, rain",
        "sampling.inference_steps": 12,
        "sampling.sampler": "Euler a",
        "sampling.guidance_scale": 4.5,
        "sampling.seed": 9,
    }
    assert values(run, expected) == expected
    assert unsupported == []


def test_an_unknown_sampler_is_reported():
    run, unsupported = carry_over({"parameters": "a cat\nSteps: 12, Sampler: Restart"})
    assert (run.sampling.sampler, run.sampling.inference_steps) == ("auto", 12)
    assert unsupported == ["sampling.sampler = Restart"]
