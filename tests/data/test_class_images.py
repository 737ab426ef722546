"""Class images and prior preservation: what keeps the base's other knowledge."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from trainer import config
from trainer.cli.main import main
from trainer.errors import ConfigError
from trainer.inference import class_images
from trainer.runs import run_folder, run_status
from trainer.runs.events import EventLog
from trainer.training.runner import run_in
from trainer.training.setup import prepare
from trainer.training.step.losses import microbatch_losses
from trainer.training.step.optimizer_step import forward_backward


@pytest.fixture
def session_of(tiny_run):
    def make(changes=None):
        run = tiny_run(changes or {})
        folder = run_folder.create(run)
        return prepare(run, folder, EventLog(folder / "events.jsonl"))

    return make


def losses(session, count=6):
    return [float(sum(microbatch_losses(session, number)).detach()) for number in range(count)]


# Class images


def test_missing_class_images_are_generated_and_trained(session_of, tmp_path):
    folder = tmp_path / "class"
    session = session_of({
        "dataset.regularisation_folder": str(folder),
        "dataset.class_words": "a cat",
        "dataset.class_pictures": 3,
    })  # fmt: skip
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"class-0000{n}.{kind}" for n in (1, 2, 3) for kind in ("png", "txt")]
    examples = session.data.class_examples
    assert [(example.caption, example.resolution) for example in examples] == [("a cat", 32)] * 3
    assert session.total_steps == 6
    assert len(session.data.examples) == 4


def test_a_deleted_class_image_is_generated_again_identically(session_of, tmp_path):
    folder = tmp_path / "class"
    changes = {
        "dataset.regularisation_folder": str(folder),
        "dataset.class_words": "a cat",
        "dataset.class_pictures": 2,
    }
    session_of(changes)
    first = (folder / "class-00001.png").read_bytes()
    (folder / "class-00001.png").unlink()
    session_of(changes)
    assert (folder / "class-00001.png").read_bytes() == first


def test_prior_loss_weight_scales_the_loss_on_class_images(session_of, tmp_path):
    changes = {
        "dataset.regularisation_folder": str(tmp_path / "class"),
        "dataset.class_words": "a cat",
        "dataset.class_pictures": 3,
    }
    without = torch.tensor(losses(session_of()))
    light = torch.tensor(losses(session_of(changes)))
    heavy = torch.tensor(losses(session_of(changes | {"dataset.prior_loss_weight": 3.0})))
    assert (light > without).all()
    torch.testing.assert_close(heavy - without, 3 * (light - without))


def test_an_empty_class_folder_is_an_error_that_names_the_setting(tiny_run, tmp_path):
    folder = run_folder.create(tiny_run({"dataset.regularisation_folder": str(tmp_path / "none")}))
    assert run_in(folder) == 1
    assert "dataset.class_pictures" in run_status.read_status(folder).message


def test_class_images_can_be_generated_from_the_command_line(tiny_base, outputs, tmp_path, capsys):
    settings = {
        "base.model": tiny_base,
        "dataset.resolution": 32,
        "dataset.bucket_step": 8,
        "dataset.class_words": "a cat",
        "dataset.regularisation_folder": tmp_path / "class",
        "dataset.class_pictures": 2,
        "sampling.inference_steps": 2,
    }
    options = [f"--set={name}={value}" for name, value in settings.items()]
    assert main(["class-pictures", "sd15-subject", *options]) == 0
    assert str(tmp_path / "class") in capsys.readouterr().out
    assert len(list((tmp_path / "class").glob("*.png"))) == 2


def test_class_images_need_class_words(outputs, capsys):
    assert main(["class-pictures", "sd15-subject"]) == 1
    assert "dataset.class_words" in capsys.readouterr().err


def test_class_images_are_read_without_augmentation_trigger_and_masks():
    run = config.replace(
        config.RunConfig(),
        {"dataset.flip": True, "dataset.trigger": "x", "dataset.masked_loss": "alpha"},
    )
    plain = class_images.plain_settings(run).dataset
    assert (plain.flip, plain.trigger, plain.masked_loss) == (False, "", "off")


# Prior preservation


@pytest.mark.parametrize("rate", [0.0, 1e-3], ids=["unet", "with-text-encoder"])
def test_prior_preservation_penalises_only_changes_of_the_prior(session_of, rate):
    """A fresh adapter changes nothing, so it costs nothing. Afterwards the loss is higher."""
    changes = {
        "dataset.trigger": "zorbit",
        "dataset.class_words": "a cat",
        "training.text_encoder_learning_rate": rate,
    }
    without = session_of(changes)
    preserved = session_of(changes | {"objective.prior_preservation": 10.0})
    assert losses(without) == losses(preserved)
    for session in (without, preserved):
        for number, (name, parameter) in enumerate(session.optimisation.parameters.items()):
            if "lora_B" in name:
                rng = torch.Generator().manual_seed(number)
                torch.nn.init.normal_(parameter, std=0.5, generator=rng)
    for low, high in zip(losses(without), losses(preserved), strict=True):
        assert low < high
    assert all(p.requires_grad for p in preserved.optimisation.parameters.values())


def test_summands_of_a_step_are_differentiated_one_at_a_time(session_of, tmp_path):
    """A step holds the activations of one forward pass. The gradients are the sum's."""
    for number in range(3):
        Image.new("RGB", (32, 32), (40 * number, 90, 20)).save(tmp_path / f"{number}.png")
    session = session_of({
        "dataset.regularisation_folder": str(tmp_path),
        "dataset.class_words": "a cat",
        "dataset.trigger": "picture",
        "dataset.prior_loss_weight": 0.5,
        "objective.prior_preservation": 2.0,
    })  # fmt: skip
    order, predict = [], session.model.predict

    def recorded(*arguments):
        prediction = predict(*arguments)
        order.append("forward")
        prediction.register_hook(lambda gradient: order.append("backward"))
        return prediction

    session.model = replace(session.model, predict=recorded)
    loss = forward_backward(session, 1, torch.amp.GradScaler("cpu", enabled=False))
    assert order == ["forward", "backward"] * 3

    parameters = list(session.optimisation.parameters.values())
    separate = torch.cat([parameter.grad.flatten() for parameter in parameters])
    total = sum(microbatch_losses(session, 0))
    together = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    torch.testing.assert_close(loss, total.detach())
    torch.testing.assert_close(separate, together, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.prior_preservation": 1.0}, "Set dataset.trigger"),
        ({"dataset.class_pictures": 5}, "dataset.class_words"),
        ({"dataset.random_crop": True, "dataset.crop": "none"}, "Choose one"),
    ],
)
def test_contradicting_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.replace(config.RunConfig(), changes)
