"""What a step sees of the dataset: views, captions, masks, resolutions, class pictures, the prior. On a tiny real pipeline."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from trainer import config
from trainer.cli.main import main
from trainer.data import examples
from trainer.errors import ConfigError
from trainer.inference import class_images
from trainer.runs import run_folder, run_status
from trainer.runs.events import EventLog
from trainer.training import loop, validation
from trainer.training.runner import run_in
from trainer.training.setup import prepare
from trainer.training.step.losses import _view_and_caption, microbatch_losses


@pytest.fixture
def session_of(tiny_run):
    def make(**changes):
        run = tiny_run(changes)
        folder = run_folder.create(run)
        return prepare(run, folder, EventLog(folder / "events.jsonl"))

    return make


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    """A copy to write into."""
    return shutil.copytree(tiny_dataset, tmp_path / "pictures")


def losses(session, count=6):
    return [
        float(sum(microbatch_losses(session, number)).detach())
        for number in range(count)
    ]


def test_the_draws_without_options_are_those_of_before(session_of):
    """A changed number here changes every training that was ever measured."""
    session = session_of()
    example = session.data.examples[0]
    assert (
        _view_and_caption(session, example, "", 0, 0) == (example.views[0], example.caption)
        and len(example.views) == 1
    )


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
def test_each_variation_is_seen_by_some_step_and_again_by_the_same_step(
    session_of, dataset, changes
):
    for path in dataset.glob("*.txt"):
        path.write_text("a cat, {red|blue}, sitting, outside\na second line")
    plain = {name: value for name, value in changes.items() if name == "dataset.max_aspect"}
    before = losses(session_of(**{"dataset.folder": str(dataset)} | plain))
    session = session_of(**{"dataset.folder": str(dataset)} | changes)
    after = losses(session)
    assert before != after and after == losses(session)
    assert validation.validation_losses(session) == validation.validation_losses(session)


def test_views_are_cached_and_measured_plain(session_of):
    first = session_of(
        **{"dataset.flip": True, "dataset.colour_jitter": 0.1, "dataset.variants": 3}
    )
    assert all(
        len(e.views) == 6 and len({v.mean.shape for v in e.views}) == 1 for e in first.examples
    )
    plain = session_of()
    assert all(
        torch.equal(a.mean, b.mean) for a, b in zip(first.held_out, plain.held_out, strict=True)
    )
    assert validation.validation_losses(first) == validation.validation_losses(plain)


def test_a_mirrored_view_of_sdxl_tells_the_mirrored_crop():
    from trainer.data.augment import ImageView, mirror
    from trainer.data.buckets import choose_crop
    from trainer.data.scan import DatasetItem

    crop = choose_crop(64, 32, 32, 8, max_aspect=1.0, centre=(0.25, 0.5))
    item, look = DatasetItem(None, "", 64, 32), ImageView(crop)
    assert (
        examples.size_ids(item, look)[3] + examples.size_ids(item, mirror(look))[3]
        == crop.scaled[0] - crop.bucket[0]
    )
    assert examples.size_ids(item, look)[3] != examples.size_ids(item, mirror(look))[3]


def test_each_picture_is_trained_at_each_resolution_and_held_out_at_all(session_of):
    session = session_of(
        **{
            "dataset.resolutions": [16, 24],
            "training.steps": 0,
            "training.views_per_picture": 2,
            "training.batch_size": 1,
        }
    )
    assert [e.resolution for e in session.data.examples] == [
        32,
        16,
        24,
    ] * 4 and session.total_steps == 4 * 3 * 2
    assert [e.resolution for e in session.data.validation] == [32] * 4
    with pytest.raises(ConfigError, match="bucket_step"):
        config.replace(config.RunConfig(), {"dataset.resolutions": [32]})


def test_held_out_pictures_are_held_out_at_every_resolution(session_of, tmp_path):
    from tests.tiny import make_dataset

    folder = make_dataset(tmp_path / "twelve", count=12)
    session = session_of(
        **{"dataset.folder": str(folder), "dataset.resolutions": [16], "dataset.hold_out": 0.25}
    )
    trained, measured = ({e.name for e in found} for found in (session.data.examples, session.data.validation))
    assert (
        len(trained) == 9
        and len(measured) == 3
        and not trained & measured
        and len(session.data.examples) == 18
    )


def test_folders_count_as_often_as_the_settings_or_their_names_say(session_of, dataset):
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
    assert session_of(**changes).total_steps == 4 + 2 + 1
    session = session_of(**changes, **{"dataset.repeats": ["2_named = 5", "other=3", ". = 2"]})
    assert session.total_steps == 4 * 2 + 5 + 3
    folder = run_folder.create(config.replace(session.run, {"dataset.repeats": ["nowhere = 2"]}))
    assert run_in(folder) == 1 and "no folder nowhere" in run_status.read_status(folder).message
    with pytest.raises(ConfigError, match="folder = number"):
        config.replace(session.run, {"dataset.repeats": ["a=0"]})


# Masks


def paint(folder, name, box):
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, box)
    mask.save(folder / name)


def test_a_mask_says_which_latents_count(session_of, dataset):
    changes = {"dataset.folder": str(dataset), "dataset.masked_loss": "mask"}
    before = losses(session_of(**changes | {"dataset.masked_loss": "off"}))
    paint(dataset, "00.mask.png", (0, 0, 8, 16))
    (dataset / "masks").mkdir()
    paint(dataset, "masks/02.png", (0, 0, 16, 4))
    session = session_of(**changes, **{"dataset.mask_outside": 0.25})
    masks = {e.name: e.views[0].mask for e in session.data.examples}
    assert masks["01.png"] is None and masks["03.png"] is None
    left, top = masks["00.png"], masks["02.png"]
    assert (
        left.shape == (1, 8, 8)
        and left[0, :, :4].min() == 1
        and left[0, :, 4:].max() == 0.25
        and top[0, 0].min() == 1
    )
    assert losses(session) != before
    mirrored = session_of(**changes, **{"dataset.flip": True}).examples[0].views[1].mask
    assert mirrored[0, :, 4:].min() == 1 and mirrored[0, :, :4].max() == 0


def test_transparency_can_be_the_mask(session_of, dataset):
    image = Image.open(dataset / "00.png").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(dataset / "00.png")
    session = session_of(**{"dataset.folder": str(dataset), "dataset.masked_loss": "alpha"})
    mask = session.data.examples[0].views[0].mask[0]
    assert (
        mask[0].max() < 0.2
        and mask[-1].min() > 0.8
        and session.data.examples[1].views[0].mask.min() == 1
    )


def test_a_picture_with_a_black_mask_is_named_and_left_out(session_of, dataset):
    paint(dataset, "00.mask.png", (0, 0, 0, 0))
    session = session_of(**{"dataset.folder": str(dataset), "dataset.masked_loss": "mask"})
    assert [e.name for e in session.data.examples] == ["01.png", "02.png", "03.png"]
    assert any(
        "00.png is left out" in warning and "black" in warning
        for warning in run_status.read_status(session.folder).warnings
    )


def test_a_random_cut_that_misses_the_mask_costs_no_picture(session_of, dataset):
    """Only its plain look must show something white; the other cuts are used where they do."""
    for number in range(4):
        Image.new("RGB", (64, 16), (60 * number, 90, 90)).save(dataset / f"{number:02d}.png")
        mask = Image.new("L", (64, 16), 0)
        mask.paste(255, (26, 0, 38, 16))
        mask.save(dataset / f"{number:02d}.mask.png")
    changes = {"dataset.random_crop": True, "dataset.max_aspect": 1.0, "dataset.variants": 16}
    session = session_of(
        **{"dataset.folder": str(dataset), "dataset.masked_loss": "mask"} | changes
    )
    assert not run_status.read_status(session.folder).warnings and len(session.data.examples) == 4
    assert all(
        1 < len(e.views) < 16 and all(view.mask.any() for view in e.views) for e in session.data.examples
    )


def test_a_picture_that_fails_at_one_resolution_is_left_out_at_all(session_of, dataset):
    """There its only white dot is too small to be seen."""
    Image.new("RGB", (64, 64)).save(dataset / "00.png")
    mask = Image.new("L", (256, 256), 0)
    mask.putpixel((0, 0), 255)
    mask.save(dataset / "00.mask.png")
    changes = {
        "dataset.folder": str(dataset),
        "dataset.masked_loss": "mask",
        "dataset.resolution": 64,
    }
    assert "00.png" in {e.name for e in session_of(**changes).examples}
    session = session_of(**changes, **{"dataset.resolutions": [16]})
    assert [e.name for e in session.data.examples] == [
        name for name in ("01.png", "02.png", "03.png") for _ in range(2)
    ]
    assert [
        "00.png is left out" in warning for warning in run_status.read_status(session.folder).warnings
    ] == [True]


# The prior


def test_class_pictures_are_made_where_they_lack_and_trained_beside_the_others(
    session_of, tmp_path
):
    folder = tmp_path / "class"
    changes = {"dataset.regularisation_folder": str(folder), "dataset.class_words": "a cat"}
    session = session_of(**changes, **{"dataset.class_pictures": 3})
    made = sorted(path.name for path in folder.iterdir())
    assert made == [f"class-0000{n}.{kind}" for n in (1, 2, 3) for kind in ("png", "txt")]
    assert [(e.caption, e.resolution) for e in session.data.class_examples] == [("a cat", 32)] * 3
    first = (folder / "class-00001.png").read_bytes()
    (folder / "class-00001.png").unlink()
    heavy = session_of(**changes, **{"dataset.class_pictures": 3, "dataset.prior_loss_weight": 3.0})
    assert (folder / "class-00001.png").read_bytes() == first
    alone, light, weighed = (torch.tensor(losses(s)) for s in (session_of(), session, heavy))
    torch.testing.assert_close(weighed - alone, 3 * (light - alone))
    assert (light > alone).all() and session.total_steps == 6 and len(session.data.examples) == 4


def test_a_class_folder_without_pictures_is_told(tiny_run, tmp_path):
    folder = run_folder.create(tiny_run({"dataset.regularisation_folder": str(tmp_path / "none")}))
    assert run_in(folder) == 1 and "dataset.class_pictures" in run_status.read_status(folder).message


def test_class_pictures_from_the_command_line(tiny_base, outputs, tmp_path, capsys):
    settings = {
        "base.model": tiny_base,
        "dataset.resolution": 32,
        "dataset.bucket_step": 8,
        "dataset.class_words": "a cat",
        "dataset.regularisation_folder": tmp_path / "class",
        "dataset.class_pictures": 2,
        "sampling.inference_steps": 2,
    }
    assert (
        main(
            [
                "class-pictures",
                "sd15-subject",
                *(f"--set={name}={value}" for name, value in settings.items()),
            ]
        )
        == 0
    )
    assert (
        "2 made in" in capsys.readouterr().out
        and len(list((tmp_path / "class").glob("*.png"))) == 2
    )
    assert (
        main(["class-pictures", "sd15-subject"]) == 1
        and "dataset.class_words" in capsys.readouterr().err
    )


def test_class_pictures_are_read_plainly():
    run = config.replace(
        config.RunConfig(),
        {"dataset.flip": True, "dataset.trigger": "x", "dataset.masked_loss": "alpha"},
    )
    read = class_images.plain_settings(run).dataset
    assert (read.flip, read.trigger, read.masked_loss) == (False, "", "off")


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_the_prior_is_what_the_base_does_without_the_trigger(session_of, rate):
    """An adapter that changes nothing breaks no prior; one that does is drawn back to it."""
    changes = {
        "dataset.trigger": "zorbit",
        "dataset.class_words": "a cat",
        "training.text_encoder_learning_rate": rate,
    }
    plain, kept = (
        session_of(**changes),
        session_of(**changes, **{"objective.prior_preservation": 10.0}),
    )
    assert losses(plain) == losses(kept)
    for session in (plain, kept):
        for number, (name, parameter) in enumerate(session.optimisation.parameters.items()):
            if "lora_B" in name:
                torch.nn.init.normal_(
                    parameter, std=0.5, generator=torch.Generator().manual_seed(number)
                )
    assert all(a < b for a, b in zip(losses(plain), losses(kept), strict=True))
    assert all(p.requires_grad for p in kept.optimisation.parameters.values())


def test_what_is_learned_beside_a_picture_is_differentiated_before_the_next_is_seen(
    session_of, tmp_path, monkeypatch
):
    """So that a step holds the activations of one forward pass, whatever it is made of; the gradients are those of the sum."""
    for number in range(3):
        Image.new("RGB", (32, 32), (40 * number, 90, 20)).save(tmp_path / f"{number}.png")
    changes = {
        "dataset.regularisation_folder": str(tmp_path),
        "dataset.class_words": "a cat",
        "dataset.trigger": "picture",
    }
    session = session_of(
        **changes, **{"objective.prior_preservation": 2.0, "dataset.prior_loss_weight": 0.5}
    )
    parameters, order, predict = list(session.optimisation.parameters.values()), [], session.model.predict

    def seen(*given):
        model_pred = predict(*given)
        order.append("forward")
        model_pred.register_hook(lambda gradient: order.append("backward"))
        return model_pred

    session.model = replace(session.model, predict=seen)
    loss = loop.forward_backward(
        session, 1, torch.amp.GradScaler("cpu", enabled=False)
    )
    assert order == ["forward", "backward"] * 3
    apart = torch.cat([p.grad.flatten() for p in parameters])
    whole = sum(microbatch_losses(session, 0))
    together = torch.cat([g.flatten() for g in torch.autograd.grad(whole, parameters)])
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective.prior_preservation": 1.0}, "set dataset.trigger"),
        ({"dataset.class_pictures": 5}, "dataset.class_words"),
        ({"dataset.random_crop": True, "dataset.crop": "none"}, "choose one"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config.replace(config.RunConfig(), changes)
