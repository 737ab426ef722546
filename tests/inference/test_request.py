"""The request for a sample, as the page and the command line send it."""

import json

import pytest

from trainer.config import Base
from trainer.errors import ModelError
from trainer.inference.request import SampleRequest, StackedAdapter, parse_request

WIRE = {
    "prompt": "a red star, żółć",
    "target": "/tmp/a.png",
    "base": {"model": "stabilityai/x", "clip_skip": 2},
    "adapters": [{"file": "a.safetensors", "strength": 0.5}, {"file": "b.safetensors"}],
    "seed": 3,
    "caption_tokens": 150,
}
"""A request as JSON. Scripts and older pages send it in this form."""


def test_json_is_parsed_with_defaults_for_missing_fields():
    assert parse_request(WIRE) == SampleRequest(
        prompt="a red star, żółć",
        target="/tmp/a.png",
        base=Base(model="stabilityai/x", clip_skip=2),
        adapters=[StackedAdapter("a.safetensors", 0.5), StackedAdapter("b.safetensors", 1.0)],
        negative_prompt="",
        seed=3,
        inference_steps=20,
        guidance_scale=7.0,
        width=0,
        height=0,
        sampler="auto",
        caption_tokens=150,
    )


def test_a_request_is_one_line_of_json_that_is_parsed_to_an_equal_request():
    request = SampleRequest(
        prompt="two\nlines, żółć",
        target="x.png",
        base=Base(model="m", vae="v", clip_skip=2),
        adapters=[StackedAdapter("a.safetensors", -0.5, 0.25), StackedAdapter("b", 2.0)],
        negative_prompt="fog",
        width=512,
        sampler="Euler a",
        caption_tokens=225,
    )
    line = request.to_json()
    assert "\n" not in line and parse_request(json.loads(line)) == request


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "many"}, "seed: "),
        ({"caption_tokens": 80}, "caption_tokens: "),
        ({"adapters": [{"strength": 1.0}]}, "adapters.0.file: Field required"),
        ({"base": {"clip_skip": 99}}, "base.clip_skip: "),
        ({"target": ""}, "target: Field required"),
    ],
)
def test_an_invalid_field_is_refused_by_name(changes, message):
    with pytest.raises(ModelError, match=f"^The sample cannot be generated: {message}"):
        parse_request(WIRE | changes)


@pytest.mark.parametrize("name", ["prompt", "target"])
def test_a_missing_field_is_refused_by_name(name):
    incomplete = {key: value for key, value in WIRE.items() if key != name}
    with pytest.raises(ModelError, match=f"{name}: Field required"):
        parse_request(incomplete)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_anything_but_an_object_is_refused(data):
    with pytest.raises(ModelError, match="cannot be generated"):
        parse_request(data)
