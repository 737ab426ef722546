"""Every kind of adapter, every choice of layers: trained, saved, read back, resumed, counted."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_tiny_base
from trainer import config
from trainer.errors import ConfigError, TrainerError
from trainer.families import load_base
from trainer.lora import initialization, inject, targets, writer
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


def adapter_of(folder):
    return load_file(folder / run_status.read_status(folder).finished.file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_is_saved_as_it_is_and_resumes_to_the_bit(train_tiny, kind):
    """On linear layers and convolutions of the UNet and all of the text encoder; the saved file is compared by the run itself."""
    dropout = (
        {"adapter.dropout": 0.2}
        if kind == "dora"
        else {"adapter.rank_dropout": 0.2, "adapter.module_dropout": 0.2}
    )
    folder = train_tiny(SHORT | EVERYTHING | KINDS[kind] | dropout | {"adapter.kind": kind})
    straight, losses = adapter_of(folder), run_status.read_status(folder).losses
    shutil.rmtree(folder / "state" / "000004")
    assert run_in(folder) == 0
    assert same(adapter_of(folder), straight) and run_status.read_status(folder).losses == losses
    ends = {name.split(".", 1)[1] for name in straight}
    assert any(name.startswith("lora_te_") for name in straight) and any(
        "conv1" in name for name in straight
    )
    marks = {"dora_scale": "dora", "hada_w1_a": "loha", "lokr_w1": "lokr"}
    assert {marks[end] for end in ends & marks.keys()} == {kind} - {"lora", "rslora"}


@pytest.mark.parametrize("init", initialization.INITS)
def test_every_start_trains_is_saved_as_it_is_and_resumes_to_the_bit(train_tiny, init):
    dropout = {} if init in ("pissa", "olora") else {"adapter.rank_dropout": 0.2}
    folder = train_tiny(
        SHORT
        | {"adapter.targets": "linear+conv", "adapter.init": init, "adapter.rank": 4}
        | dropout
    )
    straight = adapter_of(folder)
    shutil.rmtree(folder / "state" / "000004")
    assert run_in(folder) == 0 and same(adapter_of(folder), straight)
    ranks = {t.shape[0] for name, t in straight.items() if name.endswith("lora_down.weight")}
    assert ranks == ({8} if init in ("pissa", "olora") else {4})


@pytest.fixture
def base(tiny_base):
    return load_base(config.Base(model=str(tiny_base)), torch.float32)


def injected(base, part="unet", **changes):
    module = getattr(base.pipe, part)
    inject.inject(module, part, config.Adapter(**({"rank": 2, "alpha": 4.0} | changes)), seed=1)
    return module


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
def test_the_parameters_of_every_choice_are_those_estimated_before(base, choice):
    module = injected(base, **choice)
    counted = sum(parameter.numel() for parameter in inject.trainable(module).values())
    adapter = config.Adapter(**({"rank": 2, "alpha": 4.0} | choice))
    assert estimate.adapter_parameters(adapter, "unet", base.files.tensors["unet"]) == counted > 0


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_delta_w_is_what_the_layer_adds(base, choice):
    """W x + delta W x, worked out from the tensors of the file, is the layer's output."""
    module, generator = injected(base, **choice), torch.Generator().manual_seed(0)
    for parameter in inject.trainable(module).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for adapted in inject.adapted_modules({"unet": module}):
        layer = module.get_submodule(adapted.name)
        weight = layer.get_base_layer().weight.detach()
        inputs = torch.randn(
            2, weight.shape[1], *([6, 6] if weight.dim() == 4 else []), generator=generator
        )
        with torch.no_grad():
            theirs = layer(inputs)
            layer.get_base_layer().weight += adapted.change(weight)
            torch.testing.assert_close(layer.get_base_layer()(inputs), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["attention", "linear+conv"])
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_what_little_was_learned_survives_the_rounding_of_the_file(base, init, targets, tmp_path):
    """A start along W is as large as W itself, and is taken off again; an orthogonal one cancels itself."""
    module, generator = (
        injected(base, init=init, targets=targets, rank=8),
        torch.Generator().manual_seed(0),
    )
    for parameter in inject.trainable(module).values():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
    modules = list(inject.adapted_modules({"unet": module}))
    assert all(
        adapted.delta.norm()
        < 0.1 * module.get_submodule(adapted.name).get_base_layer().weight.norm()
        for adapted in modules
    )
    writer.save_adapter(
        tmp_path / "a.safetensors", "kohya", modules, base.family, torch.float16, {}
    )
    writer.verify(tmp_path / "a.safetensors", modules)


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("init", initialization.INITS)
def test_every_start_is_the_base_and_has_its_shape(base, init, rank):
    """Rank 40 is more than the smaller sides have."""
    inputs = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        500,
        torch.randn(2, 5, 32),
    )
    with torch.no_grad():
        before = base.pipe.unet(*inputs).sample
        module = injected(base, init=init, targets="linear+conv", rank=rank)
        torch.testing.assert_close(module(*inputs).sample, before, rtol=1e-4, atol=1e-5)
    layer = module.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    a, b = layer.lora_A[inject.ADAPTER].weight, layer.lora_B[inject.ADAPTER].weight
    a, b, weight = a.detach(), b.detach(), layer.base_layer.weight
    product = b @ a * (1.0 if init == "olora" else layer.scaling[inject.ADAPTER])
    if init == "gaussian":
        assert not b.any() and abs(float(a.std()) * rank - 1) < 0.3
    elif init == "orthogonal":
        assert a.any() and b.any() and product.norm() < 1e-5
    elif rank == 40:
        torch.testing.assert_close(product, weight, rtol=1e-3, atol=1e-5)
    elif init == "pissa":
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(
            torch.linalg.svdvals(weight - product)[: len(values) - rank],
            values[rank:],
            rtol=1e-3,
            atol=1e-5,
        )
    else:
        torch.testing.assert_close(b.T @ b, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_rank_and_module_dropout_leave_out_their_share(base, kind):
    """With a seed the same again, without training nothing at all."""
    module = injected(
        base, kind=kind, rank=8, targets="linear+conv", rank_dropout=0.5, module_dropout=0.3
    )
    for parameter in inject.trainable(module).values():
        torch.nn.init.normal_(parameter)
    layer = module.get_submodule("mid_block.resnets.0.conv1")
    inputs = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        alone = layer.base_layer(inputs)
        assert torch.equal(layer(inputs), layer(inputs))
        layer.train()
        torch.manual_seed(3)
        outputs = torch.stack([layer(inputs) for _ in range(300)])
        torch.manual_seed(3)
        assert torch.equal(layer(inputs), outputs[0])
        as_base = sum(torch.allclose(output, alone) for output in outputs) / 300
        layer.eval()
        assert 0.2 < as_base < 0.42 and len({float(output.sum()) for output in outputs}) > 100
        changes, whole = outputs - alone, layer(inputs) - alone
        assert (
            0.45 < float((changes.mean(0) * whole).sum() / whole.square().sum()) < 0.95
        )  # 0.7 on the average


def test_each_choice_of_layers_holds_the_one_before(base):
    shapes = inject.weight_shapes(base.pipe.unet)
    names = [
        {
            target.name
            for target in targets.choose_targets(config.Adapter(targets=choice), "unet", shapes)
        }
        for choice in targets.DENOISER
    ]
    assert all(smaller < larger for smaller, larger in zip(names, names[1:], strict=False))
    left = {name for name in shapes if name not in names[-1]}
    assert left == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    text = inject.weight_shapes(base.pipe.text_encoder)
    every = targets.choose_targets(config.Adapter(text_encoder_targets="all"), "text_encoder", text)
    assert {t.name for t in every} == set(text)


def test_ranks_and_alphas_by_name():
    adapter = config.Adapter(
        rank=4,
        alpha=2.0,
        conv_rank=6,
        conv_alpha=9.0,
        ranks="mid_block=8, attn2=0",
        alphas="to_k=7, conv2=1.5",
    )
    shapes = {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_k": (8, 8),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (8, 8),
        "up_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
        "up_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
        "mid_block.resnets.0.conv2": (8, 8, 3, 3),
    }
    chosen = targets.choose_targets(
        adapter.model_copy(update={"targets": "linear+conv"}), "unet", shapes
    )
    assert [(t.rank, t.alpha) for t in chosen] == [(8, 4.0), (8, 7.0), (4, 2.0), (6, 9.0), (8, 1.5)]
    assert [
        t.rank
        for t in targets.choose_targets(
            adapter.model_copy(update={"ranks": "unet=3"}), "unet", shapes
        )
    ] == [3, 3, 3]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter.target_pattern": "("}, "not a valid regular expression"),
        ({"adapter.target_pattern": "x" * 201}, "200"),
        ({"adapter.ranks": "mid_block:3"}, "mid_block=32"),
        ({"adapter.ranks": "mid_block=3.5"}, "whole numbers"),
        ({"adapter.alphas": "mid_block=0"}, "above 0"),
        (
            {"adapter.kind": "loha", "adapter.dropout": 0.1},
            "adapter.dropout does not exist for loha",
        ),
        ({"adapter.kind": "dora", "adapter.module_dropout": 0.1}, "do not exist for dora"),
        ({"adapter.kind": "lokr", "adapter.init": "pissa"}, "does not exist for lokr"),
        (
            {"adapter.kind": "lokr", "saving.dialects": ["kohya", "peft"]},
            "peft cannot hold adapter.kind = lokr",
        ),
        (
            {"adapter.kind": "loha", "saving.dialects": ["diffusers"]},
            "diffusers cannot hold adapter.kind = loha",
        ),
        ({"adapter.lokr_factor": 4}, "lokr only"),
        ({"base.quantization": "4bit", "adapter.kind": "dora"}, "use lora or rslora"),
        (
            {
                "training.text_encoder_until": 0.5,
                "training.learning_rate": 0.0,
                "training.text_encoder_learning_rate": 0.1,
            },
            "nothing to train",
        ),
        ({"adapter.init": "olora", "adapter.module_dropout": 0.1}, "does not go with adapter.init"),
        ({"adapter.targets": "linear", "adapter.target_pattern": "a"}, "give one of them"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config.replace(config.RunConfig(), changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter.target_pattern": "nowhere"}, "matches no module of the unet"),
        ({"adapter.target_pattern": r"(?:(.)|(..)|(...))+\3\3\2\2$"}, "takes too long"),
        ({"adapter.ranks": "nowhere=3"}, "contains nowhere"),
        ({"adapter.ranks": "unet=0"}, "left to train"),
    ],
)
def test_what_fits_no_module_is_told_before_the_start(tiny_run, changes, words):
    run = tiny_run(changes)
    with pytest.raises(ConfigError, match=words):
        estimate.trainable_parameters(run)
    folder = run_folder.create(run)
    assert run_in(folder) == 1 and words in run_status.read_status(folder).message


def tensors_of(folder, step):
    return load_file(folder / f"tiny-{step:06d}.safetensors")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"adapter.target_pattern": "nowhere"}, "matches no module of the unet"),
        ({"adapter.start_from": "/nowhere.safetensors"}, "no adapter file"),
        (
            {"training.learning_rate": 0.0, "training.text_encoder_2_learning_rate": 1e-3},
            "Nothing would be trained",
        ),
        ({"training.optimizer_args": ["momentum=0.9"]}, "takes no momentum"),
        ({"adapter.kind": "dora", "base.model": "sd3"}, "use lora or rslora there"),
        ({"sampling.sampler": "DDIM", "base.model": "sd3"}, "Choose one of: Euler, Heun"),
    ],
)
def test_what_cannot_be_trained_is_told_before_the_pictures_are_encoded(
    tiny_run, tmp_path, monkeypatch, changes, words
):
    """Which takes minutes."""
    if changes.get("base.model") == "sd3":
        changes = changes | {
            "base.model": str(save_tiny_base(tmp_path / "sd3", kind="sd3")),
            "objective.weighting": "sigma_sqrt",
        }
    monkeypatch.setattr(
        setup, "_encode_dataset", lambda *_: pytest.fail("the pictures were encoded first")
    )
    with pytest.raises(TrainerError, match=words):
        setup.prepare(tiny_run(changes), tmp_path, events.SilentLog())


def test_a_run_goes_on_from_a_file_also_where_the_base_is_quantised(
    train_tiny, tiny_run, tmp_path, monkeypatch
):
    """Weights of 4 bits are stored in another shape, which says nothing of the file (a stand-in: bitsandbytes needs a GPU)."""
    file = train_tiny({"training.steps": 1, "saving.saves": 1}) / "tiny.safetensors"

    def flattened(denoiser, *_):
        for layer in denoiser.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight = torch.nn.Parameter(
                    layer.weight.reshape(-1, 1)[::2], requires_grad=False
                )

    monkeypatch.setattr(setup.quantization, "load_bitsandbytes", lambda *_: None)
    monkeypatch.setattr(setup.quantization, "quantize", flattened)
    run = tiny_run({"adapter.start_from": str(file), "base.quantization": "4bit"})
    session = setup.prepare(run, tmp_path, events.SilentLog())
    assert any(p.any() for name, p in session.optimisation.parameters.items() if "lora_B" in name)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_text_encoders_stop_after_their_share_and_resume_to_the_bit(
    train_tiny, on_gpu, monkeypatch
):
    """The file of step 3 and that of step 6 hold the same text encoder and another UNet, dropout or not."""
    changes = {
        "training.text_encoder_learning_rate": 1e-2,
        "training.text_encoder_until": 0.5,
        "adapter.dropout": 0.2,
        "saving.state_every": 2,
    }
    if on_gpu:  # where gradients are zeroed, not taken away
        monkeypatch.setattr(
            optimizer_step, "clear_gradients", lambda session: session.optimisation.optimizer.zero_grad(set_to_none=False)
        )
    folder = train_tiny({"saving.precision": "fp32"} | changes)
    halfway, end = tensors_of(folder, 3), tensors_of(folder, 6)
    for name in end:
        assert torch.equal(halfway[name], end[name]) == (
            name.startswith("lora_te") or name.endswith("alpha")
        ), name
    shutil.rmtree(folder / "state" / "000006")
    assert run_in(folder) == 0 and same(tensors_of(folder, 6), end)


def test_each_text_encoder_has_a_learning_rate_of_its_own(train_tiny, tiny_run, tmp_path):
    base = save_tiny_base(tmp_path / "xl", kind="sdxl")
    changes = {
        "base.model": str(base),
        "training.text_encoder_learning_rate": 1e-3,
        "training.steps": 1,
        "saving.saves": 1,
    }
    frozen = adapter_of(
        train_tiny(
            changes | {"training.text_encoder_2_learning_rate": 0.0, "sampling.inference_steps": 1}
        )
    )
    assert {name.split("_text")[0] for name in frozen if "_te" in name} == {"lora_te1"}
    for second, rates in ((-1.0, [1e-2, 1e-3, 1e-3]), (1e-4, [1e-2, 1e-3, 1e-4])):
        run = tiny_run(changes | {"training.text_encoder_2_learning_rate": second})
        folder = run_folder.create(run)
        session = setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))
        assert list(session.model.components) == ["unet", "text_encoder", "text_encoder_2"]
        assert [group["initial_lr"] for group in session.optimisation.optimizer.param_groups] == rates


def test_a_rate_for_an_encoder_that_is_not_there_is_told(tiny_run):
    folder = run_folder.create(
        tiny_run({"training.learning_rate": 0.0, "training.text_encoder_2_learning_rate": 1e-3})
    )
    assert run_in(folder) == 1 and "Nothing would be trained" in run_status.read_status(folder).message


@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_no_layer_changes_more_than_the_norm_cap(train_tiny, init):
    changes = SHORT | {"training.learning_rate": 0.1, "adapter.init": init}
    folders = [train_tiny(changes | {"adapter.max_norm": limit}) for limit in (0.0, 0.02)]
    files = [read_adapter(folder / run_status.read_status(folder).finished.file) for folder in folders]
    free, capped = (max(float(module.delta.norm()) for module in file.modules) for file in files)
    assert free > 0.03 and 0.0199 < capped < 0.0201


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_cap_shrinks_what_is_too_long_and_nothing_else(base, kind):
    module = injected(base, kind=kind, targets="linear+conv")
    for parameter in inject.trainable(module).values():
        torch.nn.init.normal_(
            parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel())
        )
    before = [m.delta for m in inject.adapted_modules({"unet": module})]
    limit = sorted(float(delta.norm()) for delta in before)[len(before) // 2]
    inject.cap_norms([module], limit)
    for old, adapted in zip(before, inject.adapted_modules({"unet": module}), strict=True):
        torch.testing.assert_close(
            adapted.delta, old * min(1.0, limit / float(old.norm())), rtol=1e-4, atol=1e-6
        )


def test_offloaded_activations_go_to_the_cpu_and_change_no_number(train_tiny, monkeypatch):
    kept, real = [], torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(
        torch.autograd.graph,
        "save_on_cpu",
        lambda **options: kept.append(options) or real(**options),
    )
    plain = adapter_of(train_tiny(SHORT))
    assert not kept
    assert (
        same(adapter_of(train_tiny(SHORT | {"training.activation_offload": True})), plain)
        and len(kept) >= 4
    )


def test_the_start_tells_what_is_trained_of_each_component(train_tiny, capsys):
    started = run_status.read_status(train_tiny(SHORT | EVERYTHING)).started
    assert started.parameters.keys() == started.base_parameters.keys() == {"unet", "text_encoder"}
    assert sum(started.parameters.values()) == started.trainable_parameters
    assert 100_000 < started.base_parameters["unet"] < 1_000_000


@pytest.mark.parametrize("how", ["8bit", "4bit"])
def test_quantization_without_a_gpu_or_its_package_is_a_sentence(
    tiny_run, tiny_base, monkeypatch, how
):
    if not torch.cuda.is_available():
        folder = run_folder.create(tiny_run({"base.quantization": how}))
        assert run_in(folder) == 1 and "needs an NVIDIA GPU" in run_status.read_status(folder).message
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs the bitsandbytes package"):
        quantize(
            torch.nn.Sequential(torch.nn.Linear(2, 2)), how, torch.float32, torch.device("cuda")
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_works_on_a_base_in_half_precision(tiny_base, kind, dtype):
    """Dropout on convolutions is beyond PEFT's DoRA there, and is told."""
    base = load_base(config.Base(model=str(tiny_base)), dtype)
    module = injected(base, kind=kind, targets="linear+conv")
    inputs = torch.randn(1, 4, 8, 8, dtype=dtype), 500, torch.randn(1, 5, 32, dtype=dtype)
    module.train()(*inputs).sample.float().square().mean().backward()
    gradients = [p.grad for p in inject.trainable(module).values()]
    assert any(g is not None and g.any() for g in gradients) and all(
        g is None or g.dtype == torch.float32 for g in gradients
    )
    if kind == "dora":
        with pytest.raises(ConfigError, match="adapter.dropout does not work with dora"):
            injected(
                load_base(config.Base(model=str(tiny_base)), dtype),
                kind=kind,
                targets="linear+conv",
                dropout=0.1,
            )
