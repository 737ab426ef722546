"""What a training step sees of the dataset, on a tiny real pipeline.

Views, captions, resolutions, the validation set and masks. Class images are in
`test_class_images.py`.
"""

import shutil

import pytest
import torch
from PIL import Image

from tests.tiny import make_dataset
from trainer import config
from trainer.data import examples
from trainer.data.augment import ImageView, mirror
from trainer.data.buckets import choose_crop
from trainer.data.scan import DatasetItem, held_out_count
from trainer.errors import ConfigError
from trainer.runs import run_folder, run_status
from trainer.runs.events import EventLog
from trainer.training import validation
from trainer.training.runner import run_in
from trainer.training.setup import prepare
from trainer.training.step.losses import OF_IMAGES, _view_and_caption, microbatch_losses

STEPS = 200


@pytest.fixture
def session_of(tiny_run):
    def make(changes=None):
        run = tiny_run(changes or {})
        folder = run_folder.create(run)
        return prepare(run, folder, EventLog(folder / "events.jsonl"))

    return make


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    """A copy of the tiny dataset, to write into."""
    return shutil.copytree(tiny_dataset, tmp_path / "images")


@pytest.fixture
def captioned(dataset):
    """A dataset whose captions have tags, a choice and a second line."""
    for path in dataset.glob("*.txt"):
        path.write_text("a cat, {red|blue}, sitting, outside\na second line")
    return dataset


def losses(session, count=6):
    return [float(sum(microbatch_losses(session, number)).detach()) for number in range(count)]


def seen(session, steps=STEPS):
    """Returns the number of the view and the caption of the first image in each step."""
    example = session.data.examples[0]
    result = []
    for step in range(steps):
        view, caption = _view_and_caption(session, example, OF_IMAGES, step, 0)
        number = next(i for i, other in enumerate(example.views) if other is view)
        result.append((number, caption))
    return result


# Random draws


def test_losses_without_options_never_change(session_of):
    """Another number here changes every training of an earlier version that is resumed.

    The tolerance is for the arithmetic of other processors; another draw of noise, timestep or
    image changes the loss by far more.
    """
    session = session_of()
    example = session.data.examples[0]
    assert len(example.views) == 1
    assert set(seen(session, 10)) == {(0, example.caption)}
    expected = [1.077432, 1.030081, 1.022326, 0.527329, 0.759224, 1.090758]
    assert losses(session) == pytest.approx(expected, rel=1e-3)


def test_view_of_a_step_never_changes(session_of):
    session = session_of({"dataset.flip": True, "dataset.colour_jitter": 0.1})
    assert len(session.data.examples[0].views) == 16
    assert [number for number, _ in seen(session, 8)] == [12, 12, 14, 9, 10, 14, 10, 5]


def test_caption_of_a_step_never_changes(session_of, captioned):
    session = session_of({
        "dataset.folder": str(captioned),
        "dataset.caption_wildcards": True,
        "dataset.shuffle_tags": True,
    })  # fmt: skip
    assert [caption for _, caption in seen(session, 4)] == [
        "a cat, outside, red, sitting",
        "a second line",
        "a cat, sitting, red, outside",
        "a second line",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset.flip": True},
        {"dataset.random_crop": True, "dataset.max_aspect": 1.0},
        {"dataset.colour_jitter": 0.3},
        {"dataset.shuffle_tags": True, "dataset.keep_tags": 0},
        {"dataset.tag_dropout": 0.5, "dataset.keep_tags": 0},
        {"dataset.caption_wildcards": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_step_draws_the_same_variation_again(session_of, captioned, changes):
    session = session_of({"dataset.folder": str(captioned)} | changes)
    assert len(set(seen(session))) > 1
    assert seen(session) == seen(session)
    assert losses(session) == losses(session)


# Views


def test_steps_see_each_image_mirrored_half_of_the_time(session_of):
    session = session_of({"dataset.flip": True})
    plain, mirrored = session.data.examples[0].views
    assert not torch.equal(plain.mean, mirrored.mean)
    numbers = [number for number, _ in seen(session)]
    assert sum(numbers) / STEPS == pytest.approx(0.5, abs=0.1)


def test_random_crops_see_other_parts_of_a_long_image(session_of, dataset):
    Image.linear_gradient("L").resize((96, 32)).convert("RGB").save(dataset / "00.png")
    changes = {"dataset.folder": str(dataset), "dataset.max_aspect": 1.0}
    views = session_of(changes | {"dataset.random_crop": True}).data.examples[0].views
    lefts = {view.size_ids[3] for view in views}
    assert len(lefts) > 3
    assert lefts <= set(range(96 - 32 + 1))
    (plain,) = session_of(changes).data.examples[0].views
    assert plain.size_ids[3] == 32
    assert torch.equal(views[0].mean, plain.mean)


def test_validation_uses_the_plain_views(session_of):
    changes = {"dataset.flip": True, "dataset.colour_jitter": 0.1, "dataset.variants": 3}
    varied, plain = session_of(changes), session_of()
    for example in varied.data.examples:
        assert len(example.views) == 6
        assert len({view.mean.shape for view in example.views}) == 1
    for ours, expected in zip(varied.data.validation, plain.data.validation, strict=True):
        assert torch.equal(ours.mean, expected.mean)
    assert validation.validation_losses(varied) == validation.validation_losses(plain)


def test_size_ids_of_a_mirrored_view_count_from_the_other_side():
    crop = choose_crop(64, 32, 32, 8, max_aspect=1.0, centre=(0.25, 0.5))
    item, view = DatasetItem(None, "", 64, 32), ImageView(crop)
    assert examples.size_ids(item, view) == (32, 64, 0, 0, 32, 32)
    assert examples.size_ids(item, mirror(view)) == (32, 64, 0, 32, 32, 32)


# Captions


def test_wildcards_give_steps_each_line_and_choice(session_of, captioned):
    session = session_of({"dataset.folder": str(captioned), "dataset.caption_wildcards": True})
    assert {caption for _, caption in seen(session)} == {
        "a cat, red, sitting, outside",
        "a cat, blue, sitting, outside",
        "a second line",
    }
    assert session.data.examples[0].caption == "a cat, red, sitting, outside"


def test_tag_dropout_leaves_steps_fewer_tags(session_of, dataset):
    (dataset / "00.txt").write_text("a, b, c, d")
    changes = {"dataset.tag_dropout": 0.25, "dataset.keep_tags": 0}
    session = session_of({"dataset.folder": str(dataset)} | changes)
    kept = sum(len([tag for tag in caption.split(", ") if tag]) for _, caption in seen(session))
    assert kept / (4 * STEPS) == pytest.approx(0.75, abs=0.05)


# Resolutions, validation set and repeats


def test_each_image_is_trained_at_each_resolution(session_of):
    session = session_of({
        "dataset.resolutions": [16, 24],
        "training.steps": 0,
        "training.views_per_picture": 2,
        "training.batch_size": 1,
    })  # fmt: skip
    assert [e.resolution for e in session.data.examples] == [32, 16, 24] * 4
    assert [e.resolution for e in session.data.validation] == [32] * 4
    assert session.total_steps == 4 * 3 * 2
    with pytest.raises(ConfigError, match="bucket_step"):
        config.replace(config.RunConfig(), {"dataset.resolutions": [32]})


def test_validation_images_are_trained_at_no_resolution(session_of, tmp_path):
    folder = make_dataset(tmp_path / "twelve", count=12)
    changes = {"dataset.resolutions": [16], "dataset.hold_out": 0.25}
    data = session_of({"dataset.folder": str(folder)} | changes).data
    trained = {example.name for example in data.examples}
    validated = {example.name for example in data.validation}
    assert (len(trained), len(validated)) == (9, 3)
    assert not trained & validated
    assert len(data.examples) == 18


@pytest.mark.parametrize(
    ("images", "share", "expected"),
    [(9, 0.5, 0), (10, 0.1, 1), (16, 0.1, 2), (14, 0.1, 1), (100, 0.0, 0), (25, 0.1, 2)],
)
def test_validation_set_is_the_rounded_share_of_enough_images(images, share, expected):
    run = config.replace(config.RunConfig(), {"dataset.hold_out": share})
    assert held_out_count(run, images) == expected


def test_repeats_come_from_folder_names_or_the_settings(session_of, dataset):
    for name in ("2_named", "other"):
        (dataset / name).mkdir()
        for file in dataset.glob("00.*"):
            shutil.copy(file, dataset / name)
    changes = {
        "dataset.folder": str(dataset),
        "training.steps": 0,
        "training.views_per_picture": 1,
        "training.batch_size": 1,
    }
    assert session_of(changes).total_steps == 4 + 2 + 1
    repeats = {"dataset.repeats": ["2_named = 5", "other=3", ". = 2"]}
    session = session_of(changes | repeats)
    assert session.total_steps == 4 * 2 + 5 + 3


def test_repeats_of_a_missing_folder_are_refused(tiny_run):
    folder = run_folder.create(tiny_run({"dataset.repeats": ["nowhere = 2"]}))
    assert run_in(folder) == 1
    assert "no folder nowhere" in run_status.read_status(folder).message
    with pytest.raises(ConfigError, match="folder = number"):
        config.replace(config.RunConfig(), {"dataset.repeats": ["a=0"]})


# Masks


def paint(folder, name, box):
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, box)
    mask.save(folder / name)


def test_a_mask_weights_the_latents(session_of, dataset):
    paint(dataset, "00.mask.png", (0, 0, 8, 16))
    (dataset / "masks").mkdir()
    paint(dataset, "masks/02.png", (0, 0, 16, 4))
    changes = {"dataset.folder": str(dataset), "dataset.masked_loss": "mask"}
    session = session_of(changes | {"dataset.mask_outside": 0.25})
    masks = {example.name: example.views[0].mask for example in session.data.examples}
    assert masks["01.png"] is None
    assert masks["03.png"] is None
    left, top = masks["00.png"], masks["02.png"]
    assert left.shape == (1, 8, 8)
    assert left[0, :, :4].min() == 1
    assert left[0, :, 4:].max() == 0.25
    assert top[0, 0].min() == 1
    assert top[0, -1].max() == 0.25
    mirrored = session_of(changes | {"dataset.flip": True}).data.examples[0].views[1].mask
    assert mirrored[0, :, 4:].min() == 1
    assert mirrored[0, :, :4].max() == 0


def test_transparency_can_be_the_mask(session_of, dataset):
    image = Image.open(dataset / "00.png").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(dataset / "00.png")
    session = session_of({"dataset.folder": str(dataset), "dataset.masked_loss": "alpha"})
    first, second = (example.views[0].mask[0] for example in session.data.examples[:2])
    assert first[0].max() < 0.2
    assert first[-1].min() > 0.8
    assert second.min() == 1


def test_an_image_with_a_black_mask_is_left_out_with_a_warning(session_of, dataset):
    paint(dataset, "00.mask.png", (0, 0, 0, 0))
    session = session_of({"dataset.folder": str(dataset), "dataset.masked_loss": "mask"})
    assert [e.name for e in session.data.examples] == ["01.png", "02.png", "03.png"]
    (warning,) = run_status.read_status(session.folder).warnings
    assert "00.png is left out" in warning
    assert "entirely black" in warning


def test_a_random_crop_that_misses_the_mask_is_not_used(session_of, dataset):
    """Only the plain view has to show a white part; other views without one are dropped."""
    for number in range(4):
        Image.new("RGB", (64, 16), (60 * number, 90, 90)).save(dataset / f"{number:02d}.png")
        mask = Image.new("L", (64, 16), 0)
        mask.paste(255, (26, 0, 38, 16))
        mask.save(dataset / f"{number:02d}.mask.png")
    session = session_of({
        "dataset.folder": str(dataset),
        "dataset.masked_loss": "mask",
        "dataset.random_crop": True,
        "dataset.max_aspect": 1.0,
        "dataset.variants": 16,
    })  # fmt: skip
    assert not run_status.read_status(session.folder).warnings
    assert len(session.data.examples) == 4
    for example in session.data.examples:
        assert 1 < len(example.views) < 16
        assert all(view.mask.any() for view in example.views)


def test_an_image_that_fails_at_one_resolution_is_left_out_at_all(session_of, dataset):
    """At the lower resolution the only white dot of its mask is too small to be seen."""
    Image.new("RGB", (64, 64)).save(dataset / "00.png")
    mask = Image.new("L", (256, 256), 0)
    mask.putpixel((0, 0), 255)
    mask.save(dataset / "00.mask.png")
    changes = {
        "dataset.folder": str(dataset),
        "dataset.masked_loss": "mask",
        "dataset.resolution": 64,
    }
    assert "00.png" in {example.name for example in session_of(changes).data.examples}
    session = session_of(changes | {"dataset.resolutions": [16]})
    names = [example.name for example in session.data.examples]
    assert names == ["01.png", "01.png", "02.png", "02.png", "03.png", "03.png"]
    (warning,) = run_status.read_status(session.folder).warnings
    assert "00.png is left out" in warning
