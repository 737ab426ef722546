"""Every kind of adapter: trained, saved, read back, resumed and counted."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_tiny_base
from trainer import config
from trainer.errors import ConfigError, TrainerError
from trainer.families import load_base
from trainer.lora import initialization, inject
from trainer.lora.formats.reader import read_adapter
from trainer.models.quantization import quantize
from trainer.runs import events, run_folder, run_status
from trainer.training import estimate, setup
from trainer.training.runner import run_in
from trainer.training.step import optimizer_step

KINDS = {
    "lora": {},
    "rslora": {},
    "dora": {},
    "loha": {},
    "lokr": {"adapter.lokr_factor": 2},
}
EVERYTHING = {
    "adapter.targets": "linear+conv",
    "adapter.text_encoder_targets": "all",
    "training.text_encoder_learning_rate": 1e-2,
}
SHORT = {
    "training.steps": 4,
    "saving.saves": 1,
    "saving.state_every": 2,
    "saving.precision": "fp32",
    "sampling.inference_steps": 1,
}
KIND_OF_TENSOR = {"dora_scale": "dora", "hada_w1_a": "loha", "lokr_w1": "lokr"}


def finished_file(folder):
    return folder / run_status.read_status(folder).finished.file


def adapter_of(folder):
    return load_file(finished_file(folder))


def save_of(folder, step):
    return load_file(folder / f"tiny-{step:06d}.safetensors")


def is_identical(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def resume_from_step_2(folder):
    """Removes the last checkpoint and runs the second half of a SHORT run again."""
    shutil.rmtree(folder / "state" / "000004")
    assert run_in(folder) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_as_trained_and_resumes_to_identical_weights(train_tiny, kind):
    """On linear layers and convolutions. The run itself compares the saved file."""
    dropout = {"adapter.rank_dropout": 0.2, "adapter.module_dropout": 0.2}
    if kind == "dora":
        dropout = {"adapter.dropout": 0.2}
    folder = train_tiny(SHORT | EVERYTHING | KINDS[kind] | dropout | {"adapter.kind": kind})
    tensors, losses = adapter_of(folder), run_status.read_status(folder).losses
    resume_from_step_2(folder)
    assert is_identical(adapter_of(folder), tensors)
    assert run_status.read_status(folder).losses == losses
    assert any(name.startswith("lora_te_") for name in tensors)
    assert any("conv1" in name for name in tensors)
    leaves = {name.split(".", 1)[1] for name in tensors}
    kinds = {KIND_OF_TENSOR[leaf] for leaf in leaves & KIND_OF_TENSOR.keys()}
    assert kinds == {kind} - {"lora", "rslora"}


@pytest.mark.parametrize("init", initialization.INITS)
def test_every_initialization_is_saved_as_trained_and_resumes_to_identical_weights(
    train_tiny, init
):
    subtracts_start = init in ("pissa", "olora")
    changes = {"adapter.targets": "linear+conv", "adapter.init": init, "adapter.rank": 4}
    if not subtracts_start:
        changes["adapter.rank_dropout"] = 0.2
    folder = train_tiny(SHORT | changes)
    tensors = adapter_of(folder)
    resume_from_step_2(folder)
    assert is_identical(adapter_of(folder), tensors)
    ranks = {t.shape[0] for name, t in tensors.items() if name.endswith("lora_down.weight")}
    assert ranks == ({8} if subtracts_start else {4})


@pytest.fixture
def base(tiny_base):
    return load_base(config.Base(model=str(tiny_base)), torch.float32)


def injected(base, part="unet", **settings):
    component = getattr(base.pipe, part)
    adapter = config.Adapter(**({"rank": 2, "alpha": 4.0} | settings))
    inject.inject(component, part, adapter, seed=1)
    return component


CHOICES = [
    *({"kind": kind} for kind in KINDS),
    *({"kind": kind, "targets": "linear+conv", "rank": 3} for kind in KINDS),
    {"kind": "lokr", "lokr_factor": 4, "targets": "linear", "rank": 1},
    {"targets": "attention+feed-forward"},
    {"targets": "linear+conv", "conv_rank": 1},
    {"target_pattern": "up_blocks.*attn2"},
    {"ranks": "mid_block=5, attn2=1, down_blocks=0"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_the_number_of_parameters_is_equal_to_the_estimate(base, choice):
    component = injected(base, **choice)
    counted = sum(parameter.numel() for parameter in inject.trainable(component).values())
    adapter = config.Adapter(**({"rank": 2, "alpha": 4.0} | choice))
    assert estimate.adapter_parameters(adapter, "unet", base.files.tensors["unet"]) == counted > 0


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_the_change_of_the_weight_is_equal_to_what_the_layer_adds(base, choice):
    """The layer's output is W x + delta W x, with delta W from the tensors of the file."""
    component, draw = injected(base, **choice), torch.Generator().manual_seed(0)
    for parameter in inject.trainable(component).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    for module in inject.adapted_modules({"unet": component}):
        layer = component.get_submodule(module.name)
        weight = layer.get_base_layer().weight.detach()
        sides = [6, 6] if weight.dim() == 4 else []
        inputs = torch.randn(2, weight.shape[1], *sides, generator=draw)
        with torch.no_grad():
            expected = layer(inputs)
            layer.get_base_layer().weight += module.change(weight)
            result = layer.get_base_layer()(inputs)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_rank_and_module_dropout_drop_their_fractions_in_training_only(base, kind):
    component = injected(
        base, kind=kind, rank=8, targets="linear+conv", rank_dropout=0.5, module_dropout=0.3
    )
    for parameter in inject.trainable(component).values():
        torch.nn.init.normal_(parameter)
    layer = component.get_submodule("mid_block.resnets.0.conv1")
    inputs = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        plain, full = layer.base_layer(inputs), layer(inputs)
        assert torch.equal(layer(inputs), full)
        layer.train()
        torch.manual_seed(3)
        outputs = torch.stack([layer(inputs) for _ in range(300)])
        torch.manual_seed(3)
        assert torch.equal(layer(inputs), outputs[0])
    dropped = sum(torch.allclose(output, plain) for output in outputs) / len(outputs)
    assert 0.2 < dropped < 0.42 and len({float(output.sum()) for output in outputs}) > 100
    # Ranks are rescaled, modules are not: on average 70 % of the change remains.
    change, mean_change = full - plain, (outputs - plain).mean(0)
    assert 0.45 < float((mean_change * change).sum() / change.square().sum()) < 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.target_pattern": "nowhere"}, "matches no module of the unet"),
        ({"adapter.start_from": "/nowhere.safetensors"}, "no adapter file"),
        (
            {"training.learning_rate": 0.0, "training.text_encoder_2_learning_rate": 1e-3},
            "Nothing would be trained",
        ),
        ({"training.optimizer_args": ["momentum=0.9"]}, "momentum"),
        ({"adapter.kind": "dora", "base.model": "sd3"}, "lora or rslora"),
        ({"sampling.sampler": "DDIM", "base.model": "sd3"}, "Choose one of: Euler, Heun"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_images_are_encoded(
    tiny_run, tmp_path, monkeypatch, changes, message
):
    """Encoding takes minutes."""
    if changes.get("base.model") == "sd3":
        folder = save_tiny_base(tmp_path / "sd3", kind="sd3")
        changes = changes | {"base.model": str(folder), "objective.weighting": "sigma_sqrt"}
    monkeypatch.setattr(setup, "_encode_dataset", lambda *_: pytest.fail("images were encoded"))
    with pytest.raises(TrainerError, match=message):
        setup.prepare(tiny_run(changes), tmp_path, events.SilentLog())


def test_a_run_continues_from_a_file_on_a_quantised_base(
    train_tiny, tiny_run, tmp_path, monkeypatch
):
    """Weights of 4 bits are stored in another shape (a stand-in: bitsandbytes needs a GPU)."""
    file = train_tiny({"training.steps": 1, "saving.saves": 1}) / "tiny.safetensors"

    def quantize_shapes(denoiser, *_):
        for layer in denoiser.modules():
            if isinstance(layer, torch.nn.Linear):
                stored = layer.weight.reshape(-1, 1)[::2]
                layer.weight = torch.nn.Parameter(stored, requires_grad=False)

    monkeypatch.setattr(setup.quantization, "load_bitsandbytes", lambda *_: None)
    monkeypatch.setattr(setup.quantization, "quantize", quantize_shapes)
    run = tiny_run({"adapter.start_from": str(file), "base.quantization": "4bit"})
    session = setup.prepare(run, tmp_path, events.SilentLog())
    parameters = session.optimisation.parameters.items()
    assert any(parameter.any() for name, parameter in parameters if "lora_B" in name)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_text_encoder_stops_at_its_fraction_and_resumes_to_identical_weights(
    train_tiny, set_to_none, monkeypatch
):
    """Steps 4 to 6 change the UNet only, whether gradients are removed or, as on CUDA, zeroed."""
    monkeypatch.setattr(
        optimizer_step,
        "clear_gradients",
        lambda session: session.optimisation.optimizer.zero_grad(set_to_none=set_to_none),
    )
    folder = train_tiny(
        {
            "saving.precision": "fp32",
            "training.text_encoder_learning_rate": 1e-2,
            "training.text_encoder_until": 0.5,
            "adapter.dropout": 0.2,
            "saving.state_every": 2,
        }
    )
    halfway, end = save_of(folder, 3), save_of(folder, 6)
    for name in end:
        is_fixed = name.startswith("lora_te") or name.endswith("alpha")
        assert torch.equal(halfway[name], end[name]) == is_fixed, name
    shutil.rmtree(folder / "state" / "000006")
    assert run_in(folder) == 0
    assert is_identical(save_of(folder, 6), end)


ONE_STEP_OF_SDXL = {
    "training.text_encoder_learning_rate": 1e-3,
    "training.steps": 1,
    "saving.saves": 1,
    "sampling.inference_steps": 1,
}


@pytest.mark.parametrize(
    ("second_rate", "expected"), [(-1.0, [1e-2, 1e-3, 1e-3]), (1e-4, [1e-2, 1e-3, 1e-4])]
)
def test_the_second_text_encoder_can_have_another_learning_rate(
    base_of, tiny_run, second_rate, expected
):
    """-1 means the rate of the first one."""
    rates = {"training.text_encoder_2_learning_rate": second_rate}
    run = tiny_run(ONE_STEP_OF_SDXL | rates | {"base.model": str(base_of("sdxl"))})
    folder = run_folder.create(run)
    session = setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))
    assert list(session.model.components) == ["unet", "text_encoder", "text_encoder_2"]
    groups = session.optimisation.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == expected


def test_a_text_encoder_with_a_rate_of_0_gets_no_adapter(base_of, train_tiny):
    rates = {"training.text_encoder_2_learning_rate": 0.0}
    folder = train_tiny(ONE_STEP_OF_SDXL | rates | {"base.model": str(base_of("sdxl"))})
    prefixes = {name.split("_text")[0] for name in adapter_of(folder) if "_te" in name}
    assert prefixes == {"lora_te1"}


def test_a_rate_for_a_text_encoder_that_does_not_exist_is_refused(tiny_run):
    rates = {"training.learning_rate": 0.0, "training.text_encoder_2_learning_rate": 1e-3}
    folder = run_folder.create(tiny_run(rates))
    assert run_in(folder) == 1
    assert "Nothing would be trained" in run_status.read_status(folder).message


@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_the_norm_cap_limits_the_change_of_every_layer(train_tiny, init):
    largest = {}
    for limit in (0.0, 0.02):
        changes = {"training.learning_rate": 0.1, "adapter.init": init, "adapter.max_norm": limit}
        file = read_adapter(finished_file(train_tiny(SHORT | changes)))
        largest[limit] = max(float(module.delta.norm()) for module in file.modules)
    assert largest[0.0] > 0.03 and largest[0.02] == pytest.approx(0.02, rel=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_cap_shrinks_only_larger_changes(base, kind):
    component = injected(base, kind=kind, targets="linear+conv")
    for parameter in inject.trainable(component).values():
        draw = torch.Generator().manual_seed(parameter.numel())
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    before = [module.delta for module in inject.adapted_modules({"unet": component})]
    limit = sorted(float(delta.norm()) for delta in before)[len(before) // 2]
    inject.cap_norms([component], limit)
    after = [module.delta for module in inject.adapted_modules({"unet": component})]
    for old, new in zip(before, after, strict=True):
        ratio = min(1.0, limit / float(old.norm()))
        torch.testing.assert_close(new, old * ratio, rtol=1e-4, atol=1e-6)


def test_offloaded_activations_give_identical_weights(train_tiny, monkeypatch):
    calls, save_on_cpu = [], torch.autograd.graph.save_on_cpu

    def record(**options):
        calls.append(options)
        return save_on_cpu(**options)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", record)
    plain = adapter_of(train_tiny(SHORT))
    assert not calls
    offloaded = adapter_of(train_tiny(SHORT | {"training.activation_offload": True}))
    assert is_identical(offloaded, plain) and len(calls) >= SHORT["training.steps"]


def test_the_start_event_contains_the_parameters_of_each_component(train_tiny):
    started = run_status.read_status(train_tiny(SHORT | EVERYTHING)).started
    assert started.parameters.keys() == started.base_parameters.keys() == {"unet", "text_encoder"}
    assert sum(started.parameters.values()) == started.trainable_parameters
    assert 100_000 < started.base_parameters["unet"] < 1_000_000


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message without a GPU")
def test_quantization_without_a_gpu_is_refused(tiny_run, bits):
    folder = run_folder.create(tiny_run({"base.quantization": bits}))
    assert run_in(folder) == 1
    assert "needs an NVIDIA GPU" in run_status.read_status(folder).message


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantization_without_its_package_is_refused(monkeypatch, bits):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="needs the bitsandbytes package"):
        quantize(model, bits, torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gets_float32_gradients_on_a_half_precision_base(tiny_base, kind, dtype):
    base = load_base(config.Base(model=str(tiny_base)), dtype)
    unet = injected(base, kind=kind, targets="linear+conv").train()
    latents, embeds = torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 5, 32, dtype=dtype)
    unet(latents, 500, embeds).sample.float().square().mean().backward()
    gradients = [parameter.grad for parameter in inject.trainable(unet).values()]
    gradients = [gradient for gradient in gradients if gradient is not None]
    assert any(gradient.any() for gradient in gradients)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_on_the_convolutions_of_a_dora_is_refused_in_half_precision(tiny_base, dtype):
    base = load_base(config.Base(model=str(tiny_base)), dtype)
    with pytest.raises(ConfigError, match="adapter.dropout does not work with dora"):
        injected(base, kind="dora", targets="linear+conv", dropout=0.1)
