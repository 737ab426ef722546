"""Every family on a tiny real pipeline: it is recognised, trained, and saved for diffusers."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.bases import predict
from tests.tiny import TINY
from trainer import config
from trainer.families import FAMILIES, families_of_adapter
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter
from trainer.lora import inject, metadata, targets, writer
from trainer.lora.formats.keys import diffusers_key
from trainer.lora.formats.reader import read_adapter
from trainer.models import model_files
from trainer.models.safetensors_header import read_header
from trainer.runs import run_status
from trainer.training import estimate, loop
from trainer.training.lr_schedules import set_learning_rate
from trainer.training.step.losses import microbatch_losses

FAMILY_OF = {
    "sd1": "sd1",
    "sd2": "sd2",
    "sd2-v": "sd2",
    "sdxl": "sdxl",
    "sdxl-v": "sdxl",
    "sd3": "sd3m",
    "sd35-medium": "sd35m",
    "sd35-large": "sd35l",
}
"""Kind of a tiny base -> key of its family in FAMILIES."""

OTHERS = [kind for kind in TINY if kind != "sd1"]  # nearly all other tests use sd1
ONE_OF_EACH = {FAMILY_OF[kind]: kind for kind in OTHERS}.values()

PROJECTIONS = [
    f"{attention}_{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out_0")
]
TEXT_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def unet_keys(blocks, depth):
    """Returns the keys of a kohya file, independently of the code that is tested."""
    return {
        f"lora_unet_{block}_transformer_blocks_{layer}_{projection}"
        for block in blocks
        for layer in range(depth)
        for projection in PROJECTIONS
    }


def text_keys(*prefixes):
    return {
        f"{prefix}_text_model_encoder_layers_{layer}_self_attn_{projection}"
        for prefix in prefixes
        for layer in (0, 1)
        for projection in TEXT_PROJECTIONS
    }


def transformer_keys(dual=()):
    """Returns the keys of two blocks; the last one discards its text, so it has no text output."""
    image, text = ["to_q", "to_k", "to_v", "to_out.0"], ["add_q_proj", "add_k_proj", "add_v_proj"]
    keys = {"transformer.transformer_blocks.0.attn.to_add_out"}
    for block in (0, 1):
        path = f"transformer.transformer_blocks.{block}"
        keys |= {f"{path}.attn.{projection}" for projection in image + text}
        if block in dual:
            keys |= {f"{path}.attn2.{projection}" for projection in image}
        for encoder in ("text_encoder", "text_encoder_2"):
            layer = f"{encoder}.text_model.encoder.layers.{block}.self_attn"
            keys |= {f"{layer}.{projection}" for projection in TEXT_PROJECTIONS}
    return keys


UNET_WITH_ONE_ENCODER = unet_keys(
    [
        "down_blocks_0_attentions_0",
        "mid_block_attentions_0",
        "up_blocks_1_attentions_0",
        "up_blocks_1_attentions_1",
    ],
    depth=1,
) | text_keys("lora_te")
XL_BLOCKS = [
    "input_blocks_4_1",
    "input_blocks_5_1",
    "middle_block_1",
    "output_blocks_0_1",
    "output_blocks_1_1",
    "output_blocks_2_1",
]
EXPECTED_KEYS = {
    "sd1": UNET_WITH_ONE_ENCODER,
    "sd2": UNET_WITH_ONE_ENCODER,
    "sdxl": unet_keys(XL_BLOCKS, depth=2) | text_keys("lora_te1", "lora_te2"),
    "sd3m": transformer_keys(),
    "sd35m": transformer_keys(dual=[0]),
    "sd35l": transformer_keys(),
}
ENDS = {
    "kohya": ("lora_down.weight", "lora_up.weight", "alpha"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
}


def train_steps(session, count):
    optimizer = session.optimisation.optimizer
    set_learning_rate(optimizer, 1.0)
    for number in range(1, count + 1):
        loop.forward_backward(session, number, torch.amp.GradScaler("cpu", enabled=False))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", TINY)
def test_exactly_one_family_matches_each_base(load, kind):
    base = load(kind)
    matching = [name for name, family in FAMILIES.items() if family.matches_base(base.files)]
    assert matching == [FAMILY_OF[kind]]
    assert base.family is FAMILIES[FAMILY_OF[kind]]


@pytest.mark.parametrize("kind", TINY)
def test_files_and_family_agree_on_the_trainable_text_encoders(load, kind):
    base = load(kind)
    trainable = list(base.family.trainable_text_encoders(base.pipe))
    assert base.files.trainable_text_encoders == trainable


@pytest.mark.parametrize("kind", TINY)
def test_each_choice_of_layers_is_wider_than_the_one_before(base_of, kind):
    files = model_files.inspect(base_of(kind))
    shapes = targets.projections(files.tensors[files.denoiser])
    counts = [
        len(targets.choose_targets(config.Adapter(targets=choice), files.denoiser, shapes))
        for choice in ("attention", "attention+feed-forward", "linear")
    ]
    assert 0 < counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("kind", OTHERS)
def test_diffusers_loads_a_trained_file_whole_and_with_the_same_effect(
    base_of, session_of, tmp_path, kind
):
    """Trains a few steps with all text encoders and an alpha that differs from the rank."""
    session = session_of(
        kind,
        **{
            "adapter.rank": 3,
            "adapter.alpha": 5.0,
            "training.learning_rate": 2e-2,
            "training.text_encoder_learning_rate": 2e-2,
        },
    )
    base = session.model.base
    family, expected_keys = base.family, EXPECTED_KEYS[FAMILY_OF[kind]]
    parameters = session.optimisation.parameters.values()
    assert sum(p.numel() for p in parameters) == estimate.trainable_parameters(session.run)
    untrained = predict(family, base.pipe)
    train_steps(session, 3)
    trained = predict(family, base.pipe)
    assert (trained - untrained).norm() > 0.02 * untrained.norm()

    modules = list(inject.adapted_modules(session.model.components))
    tensors = writer.WRITERS[family.default_format](modules, family, torch.float32)
    ends = ENDS[family.default_format]
    assert set(tensors) == {f"{key}.{end}" for key in expected_keys for end in ends}

    own, kohya = tmp_path / "own.safetensors", tmp_path / "kohya.safetensors"
    writer.save_adapter(own, family.default_format, modules, family, torch.float32, {})
    writer.save_adapter(kohya, "kohya", modules, family, torch.float32, {})
    writer.verify(kohya, modules)
    recognised = families_of_adapter(read_adapter(own))
    assert not recognised or family.name in recognised

    absent = dict.fromkeys(base.files.absent_parts)
    fresh = family.pipeline_class.from_pretrained(
        base_of(kind), **family.pipeline_options, **absent
    )
    fresh.load_lora_weights(str(own))
    components = {family.denoiser_name: family.denoiser(fresh), **family.text_encoders(fresh)}
    loaded = list(inject.adapted_modules(components, "default_0"))
    key = {"kohya": family.kohya_key, "diffusers": diffusers_key}[family.default_format]
    assert {key(module.component, module.name) for module in loaded} == expected_keys
    assert len(tensors) == len(ends) * len(loaded)
    torch.testing.assert_close(predict(family, fresh), trained, rtol=0, atol=1e-5)


def image_at(strength, file, base, tmp_path):
    """Returns a sample with an adapter file at this strength."""
    request = SampleRequest(
        "picture number 1",
        str(tmp_path / f"{strength}.png"),
        base,
        [StackedAdapter(str(file), strength)],
        inference_steps=2,
    )
    return Image.open(Sampler().render(request))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_whole_run_gives_samples_and_a_file_that_changes_images(
    base_of, load, train_tiny, tmp_path, kind
):
    folder = train_tiny(
        {
            "base.model": str(base_of(kind)),
            "training.text_encoder_learning_rate": 1e-2,
            "training.steps": 3,
            "saving.saves": 1,
        }
    )
    status = run_status.read_status(folder)
    file = folder / status.finished.file
    assert [sample.step for sample in status.samples] == [0, 3]
    assert not status.warnings
    assert not read_adapter(file).notes
    keys = {name.rsplit(".lora_", 1)[0].removesuffix(".alpha") for name in load_file(file)}
    assert keys == EXPECTED_KEYS[FAMILY_OF[kind]]

    base = load(kind)
    prediction = base.family.objective(base.pipe).prediction_type
    stored = read_header(file).metadata["modelspec.prediction_type"]
    assert stored == ("v" if prediction == "v_prediction" else prediction)

    settings = config.Base(model=str(base_of(kind)))
    without, full = (image_at(strength, file, settings, tmp_path) for strength in (0.0, 1.0))
    assert without.size == (16, 16)
    assert without.tobytes() != full.tobytes()


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl-v"])
def test_bases_with_v_prediction_learn_v(session_of, kind):
    """v = alpha noise - sigma latents (Salimans & Ho 2022, section 4), with the base's schedule."""
    session, calls = session_of(kind, **{"objective.min_snr_gamma": 0.0}), []
    real_predict = session.model.predict

    def recording(noised, batch):
        model_pred = real_predict(noised, batch)
        calls.append((noised, batch, model_pred))
        return model_pred

    session.model = replace(session.model, predict=recording)
    loss = sum(microbatch_losses(session, 0))
    noised, batch, model_pred = calls[0]
    alphas_cumprod = session.model.base.pipe.scheduler.alphas_cumprod
    alpha_bar = alphas_cumprod[noised.timesteps].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noise = (noised.noisy_latents - alpha * batch.latents) / sigma
    target = alpha * noise - sigma * batch.latents
    torch.testing.assert_close(noised.target, target, rtol=1e-3, atol=1e-3)
    expected = (model_pred - target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_all_projections_of_an_open_clip_attention_are_adapted(load, kind):
    """A1111 fuses q, k, v and out in these encoders, and ignores an attention that lacks one."""
    base = load(kind)
    name, encoder = list(base.family.text_encoders(base.pipe).items())[-1]
    inject.inject(encoder, name, config.Adapter(), seed=1)
    by_attention = {}
    for module in inject.adapted_modules({name: encoder}):
        attention, projection = module.name.rsplit(".", 1)
        by_attention.setdefault(attention, set()).add(projection)
    assert list(by_attention.values()) == [set(TEXT_PROJECTIONS)] * 2


@pytest.mark.parametrize(
    "family, prediction_type, version, v2, architecture",
    [
        ("sd1", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "v_prediction", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_metadata_identifies_the_family(family, prediction_type, version, v2, architecture):
    values = metadata.metadata_for(
        config.RunConfig(),
        FAMILIES[family],
        step=1,
        total_steps=1,
        modules=[],
        sizes=[(16, 16)],
        captions=[],
        base_hash="",
        prediction_type=prediction_type,
        started=1.0,
        finished=2.0,
    )
    assert (values["ss_base_model_version"], values["ss_v2"], values["modelspec.architecture"]) == (
        version,
        v2,
        architecture,
    )
    assert values["modelspec.prediction_type"] == (
        "v" if prediction_type == "v_prediction" else "epsilon"
    )
