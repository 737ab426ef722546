"""Checks on samples: what the adapter changes without its trigger word, and copied images."""

import pytest
import torch
from PIL import Image

from trainer.inference import sample_checks
from trainer.runs import run_status


def grey(level):
    return Image.new("RGB", (64, 64), (level,) * 3)


def test_a_leak_is_the_change_without_the_trigger_word_relative_to_the_change_with_it():
    with_trigger = (grey(0), grey(255))
    assert sample_checks.leak(with_trigger, (grey(0), grey(0))) == 0
    assert sample_checks.leak(with_trigger, (grey(0), grey(102))) == pytest.approx(0.4)


def test_there_is_no_leak_if_the_adapter_changes_nothing():
    assert sample_checks.leak((grey(0), grey(0)), (grey(0), grey(102))) is None


def test_a_copy_is_more_similar_to_an_image_than_the_images_are_to_each_other():
    draws = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 8, 8 + 4 * (index % 2), generator=draws) for index in range(6)]
    copy = images[0] + 0.05 * torch.randn(4, 8, 8, generator=draws)
    new = torch.randn(4, 8, 8, generator=draws)
    of_copy, between = sample_checks.likeness([copy], images)
    of_new, _ = sample_checks.likeness([new], images)
    assert of_copy > 0.95
    assert abs(of_new) < 0.3 and between < 0.3


def test_one_training_image_has_no_similarity_to_compare_with():
    image = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert sample_checks.likeness([image], [image]) is None


TRIGGER_RUN = {
    "dataset.trigger": "zorbit",
    "sampling.prompts": ["a zorbit on the moon", "a zorbit"],
    "training.learning_rate": 0.3,  # so high that the adapter changes every image
}


def test_each_save_is_sampled_without_the_trigger_word(train_tiny):
    from app.views.samples import samples_view

    folder = train_tiny(TRIGGER_RUN)
    status = run_status.read_status(folder)
    probes = status.probes
    assert [probe.step for probe in probes] == [0, 3, 6]
    assert {probe.prompt for probe in probes} == {"on the moon"}
    assert probes[0].leak is None, "the base has no adapter"
    assert all(probe.leak > 0 for probe in probes[1:])
    for probe in probes:
        assert (folder / probe.file).is_file()
        assert -1 <= probe.likeness <= 1
    assert [sample.file.split("-")[-1] for sample in status.samples[-2:]] == ["0.png", "1.png"]

    view = samples_view()
    leaks = [picture["leak"] for picture in view["without"]["pictures"]]
    assert leaks == [probe.leak for probe in probes]
    assert len(view["rows"]) == 2
    assert len(view["likeness"]) == 3


def test_a_prompt_without_the_trigger_word_is_not_probed_and_the_losses_stay(train_tiny):
    from app.views.samples import samples_view

    probed = run_status.read_status(train_tiny(TRIGGER_RUN))
    plain = run_status.read_status(train_tiny(TRIGGER_RUN | {"sampling.prompts": ["the moon"]}))
    assert not any(probe.file for probe in plain.probes)
    assert samples_view()["without"] is None
    assert plain.losses == probed.losses
