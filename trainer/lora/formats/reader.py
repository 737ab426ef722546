"""An adapter file of any program, read without trust: dialect, modules, and what is odd about it.

Read are kohya's keys with the names of diffusers or of Stability's own models, diffusers' from before and since PEFT, and PEFT's
folders; LoRA, LoCon, LoHa, LoKr and DoRA. A tensor that is not understood is never left out silently: the file is then refused.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import ModelError
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.keys import DOTTED, UNET_TOPS, place_of
from trainer.lora.formats.peft_config import Scales, _diffusers_scales, _peft_scales
from trainer.lora.formats.stability_names import MMDIT_FUSED
from trainer.models.safetensors_header import read_header

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIALECTS = {
    "kohya": "kohya (A1111, Forge, ComfyUI, InvokeAI, diffusers)",
    "diffusers": "diffusers",
    "old diffusers": "diffusers before PEFT",
    "peft": "PEFT folder",
}

Grouped = dict[tuple[str, str], dict[str, Tensor]]
"""(component, module) -> tensors by their name in LyCORIS."""


@dataclass(frozen=True)
class AdapterFile:
    path: Path
    dialect: str
    """A key of DIALECTS."""
    modules: list[AdaptedModule]
    """Weights in float32; text encoders without the level `text_model` in their names."""
    metadata: dict[str, str]
    dtype: str
    """The number format of the file, as torch calls it: "float16"."""
    remarks: list[str]
    """What is odd or had to be assumed, in sentences."""


def read_adapter(path: Path) -> AdapterFile:
    """Reads a .safetensors file or a PEFT folder. Raises ModelError for what is damaged, hostile, no adapter or of an unknown kind."""
    if path.is_dir():
        return _read_peft_folder(path)
    if not path.is_file():
        raise ModelError(f"There is no adapter file {path.name}.")
    metadata = read_header(path).metadata
    tensors = _load(path)
    grouped, dialects = _group(path, tensors)
    modules, remarks = _modules(path, grouped, _diffusers_scales(path, metadata))
    if (
        "atelier_version" in metadata
    ):  # written here, with the whole scale in B where there is no alpha
        remarks = []
    if len(dialects) > 1:
        remarks.append(f"It mixes the dialects {' and '.join(sorted(dialects))}.")
    return AdapterFile(
        path, dialects.most_common(1)[0][0], modules, metadata, _dtype(tensors), remarks
    )


def _read_peft_folder(path: Path) -> AdapterFile:
    """A folder of one model, or one with a folder for each component."""
    parts = (
        {path.name: path}
        if (path / PEFT_CONFIG).is_file()
        else {p: path / p for p in DOTTED if (path / p / PEFT_CONFIG).is_file()}
    )
    if not parts:
        raise ModelError(f"{path.name} is no adapter: it is a folder without {PEFT_CONFIG}.")
    modules: list[AdaptedModule] = []
    remarks: list[str] = []
    metadata: dict[str, str] = {}
    dtype = ""
    for name, folder in parts.items():
        if not (folder / PEFT_WEIGHTS).is_file():
            raise ModelError(
                f"{path.name} has no {PEFT_WEIGHTS}; other formats can run code when opened. Save it as .safetensors."
            )
        tensors = _load(folder / PEFT_WEIGHTS)
        metadata |= read_header(folder / PEFT_WEIGHTS).metadata
        grouped, _ = _group(path, tensors, component=name if name in DOTTED else "")
        found, said = _modules(path, grouped, {"": _peft_scales(folder / PEFT_CONFIG)})
        modules, remarks, dtype = [*modules, *found], [*remarks, *said], _dtype(tensors)
    return AdapterFile(path, "peft", modules, metadata, dtype, remarks)


def _guess_component(module: str) -> str:
    """Of PEFT's names, where the folder does not tell."""
    if "encoder.layers." in module:
        return "text_encoder"
    return "unet" if module.startswith(UNET_TOPS) else "transformer"


def _load(path: Path) -> dict[str, Tensor]:
    header = read_header(path)
    if not any(place_of(name) for name in header.tensors):
        raise ModelError(
            f"{path.name} is no LoRA: it holds {len(header.tensors)} tensors, and none is a low-rank pair."
        )
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(".alpha"):
            raise ModelError(
                f"{path.name} holds whole numbers instead of weights (in {name}); save it in fp16 or fp32."
            )
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(
                f"{path.name} holds numbers that are not finite (in {name}); it would only make black pictures."
            )
    return tensors


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    weights = Counter(
        tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")
    )
    return str(weights.most_common(1)[0][0]).removeprefix("torch.")


def _group(
    path: Path, tensors: Mapping[str, Tensor], component: str = ""
) -> tuple[Grouped, Counter]:
    """The tensors by module, and how many are in which dialect. `component` is that of PEFT's names, which do not tell it."""
    grouped: Grouped = {}
    dialects: Counter = Counter()
    for name, tensor in tensors.items():
        place = place_of(name)
        if place is None:
            raise ModelError(
                f"{path.name} holds more than a LoRA, LoHa, LoKr or DoRA: {name[:120]} is of a kind that is not read here, "
                "and without it the file would not do what it should."
            )
        leaves = grouped.setdefault(
            (place.component or component or _guess_component(place.module), place.module), {}
        )
        if place.leaf in leaves:
            raise ModelError(
                f"{path.name} holds {place.leaf} of {place.module} twice, under different names; it is damaged."
            )
        # PEFT has the lengths of a DoRA's outputs in shapes of its own; a LyCORIS of such a shape has those of the inputs.
        leaves[place.leaf] = (
            tensor.float().flatten()
            if place.leaf == "dora_scale" and place.dialect != "kohya"
            else tensor.float()
        )
        dialects[place.dialect] += place.leaf != "alpha"
    return grouped, dialects


def _modules(
    path: Path, grouped: Grouped, scales: Mapping[str, Scales]
) -> tuple[list[AdaptedModule], list[str]]:
    """The records, and what had to be assumed. `scales` by component, "" for all."""
    modules: list[AdaptedModule] = []
    without_alpha = []
    for (component, name), tensors in grouped.items():
        kind = next(
            (kind for kind, first in FIRST.items() if any(leaf in tensors for leaf in first)), None
        )
        if kind is None:
            raise ModelError(
                f"{path.name} has no low-rank pair for {name}, only {', '.join(sorted(tensors))[:80]}; it is damaged."
            )
        alpha, extra = tensors.pop("alpha", None), tensors.pop("scalar", torch.ones(()))
        module = AdaptedModule(component, name, kind, tensors, 1.0)
        _check_shapes(path, module)
        own = scales.get(component) or scales.get("")
        if alpha is not None and alpha.numel() == 1:
            # Two whole factors have no rank; every reader then takes the scale as 1.
            scale = float(alpha) / module.rank if module.rank else 1.0
        elif alpha is not None:
            raise ModelError(
                f"{path.name} has an alpha of {alpha.numel()} numbers for {name} instead of one; it is damaged."
            )
        elif own is not None:
            scale = own.of(name, module.rank or 1)
        else:
            scale = 1.0
            without_alpha.append(name)
        if "dora_scale" in tensors and tensors["dora_scale"].dim() == 1:
            tensors["dora_scale"] = tensors["dora_scale"].reshape(
                -1, *[1] * (module.to("meta").delta.dim() - 1)
            )
        modules += _split_fused(replace(module, scale=scale * float(extra)))
    if without_alpha:
        which = (
            "It has no alpha"
            if len(without_alpha) == len(grouped)
            else f"{len(without_alpha)} of its modules have no alpha"
        )
        return modules, [
            f"{which}; alpha = rank is assumed, as diffusers does. If it acts too strongly, its trainer used another."
        ]
    return modules, []


FIRST = {
    "lora": ("lora_down.weight", "lora_up.weight"),
    "loha": ("hada_w1_a", "hada_w1_b"),
    "lokr": ("lokr_w1", "lokr_w1_a"),
}


def _check_shapes(path: Path, module: AdaptedModule) -> None:
    """Whether the product can be formed at all, tried on tensors without content. Raises ModelError."""
    try:
        delta = module.to("meta").delta
        if (
            "dora_scale" in module.tensors
            and module.tensors["dora_scale"].numel() not in delta.shape
        ):
            raise ValueError("dora_scale")
        if delta.numel() > 2**31:
            raise ValueError(f"{delta.numel():,} weights")
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        raise ModelError(
            f"The tensors of {module.name} in {path.name} do not fit together ({str(error)[:100]}); it is damaged."
        ) from None


def _split_fused(module: AdaptedModule) -> list[AdaptedModule]:
    """Stability's MMDiT has q, k and v in one projection, diffusers in three, with one A for all."""
    block, _, inside = module.name.partition(".x_block.")
    if not inside:
        block, _, inside = module.name.partition(".context_block.")
    fused = module.name.removeprefix(f"{block}.")
    if fused not in MMDIT_FUSED:
        return [module]
    leaves = {"lora": ("lora_up.weight",), "loha": ("hada_w1_a", "hada_w2_a")}.get(module.kind, ())
    if not leaves or module.tensors[leaves[0]].shape[0] % 3:
        raise ModelError(
            f"The fused projection {module.name} cannot be split into q, k and v; it is of a kind that is not read here."
        )
    parts = []
    for index, name in enumerate(MMDIT_FUSED[fused]):
        own = dict(module.tensors)
        for leaf in (*leaves, "dora_scale"):
            if leaf in own:
                own[leaf] = own[leaf].chunk(3)[index].contiguous()
        parts.append(_without_idle_ranks(replace(module, name=f"{block}.{name}", tensors=own)))
    return parts


def _without_idle_ranks(module: AdaptedModule) -> AdaptedModule:
    """Leaves out ranks whose B is all zero: a fused file of three adapters has two thirds of them."""
    if module.kind != "lora":
        return module
    down, up = module.tensors["lora_down.weight"], module.tensors["lora_up.weight"]
    used = up.flatten(1).any(dim=0)
    if used.all() or not used.any():
        return module
    return replace(
        module,
        tensors=module.tensors | {"lora_down.weight": down[used], "lora_up.weight": up[:, used]},
    )
