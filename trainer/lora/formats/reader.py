"""Reads an adapter file of any program without trusting it: format, modules, and what is odd.

It reads kohya's keys with the names of diffusers or of Stability's own models, the formats of
diffusers before and since PEFT, and PEFT's folders, each with LoRA, LoCon, LoHa, LoKr and DoRA.
If it does not understand a tensor it refuses the file, because without that tensor the adapter
would do something else.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import ModelError
from trainer.lora.formats.adapted_module import DOWN, UP, AdaptedModule
from trainer.lora.formats.keys import COMPONENTS, UNET_PREFIXES, parse_key
from trainer.lora.formats.peft_config import Scales, scales_of_folder, scales_of_header
from trainer.lora.formats.stability_names import MMDIT_FUSED
from trainer.models.safetensors_header import read_header

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT_NAMES = {
    "kohya": "kohya (A1111, Forge, ComfyUI, InvokeAI, diffusers)",
    "diffusers": "diffusers",
    "old diffusers": "diffusers before PEFT",
    "peft": "PEFT folder",
}
REQUIRED_TENSORS = {
    "lora": (DOWN, UP),
    "loha": ("hada_w1_a", "hada_w1_b"),
    "lokr": ("lokr_w1", "lokr_w1_a"),
}
"""Each kind, and tensors of which it has at least one."""
MAX_WEIGHTS = 2**31
"""Of one module. A hostile file could describe a product that fills the memory."""

GroupedTensors = dict[tuple[str, str], dict[str, Tensor]]
"""(component, module) -> tensors by their name in LyCORIS."""


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file or PEFT folder."""

    path: Path
    file_format: str
    """A key of FORMAT_NAMES."""
    modules: list[AdaptedModule]
    """Weights in float32; text encoders without the level `text_model` in their names."""
    metadata: dict[str, str]
    dtype: str
    """The dtype of most tensors in the file, as torch names it: "float16"."""
    notes: list[str]
    """Sentences about what is odd or was assumed."""


def read_adapter(path: Path) -> AdapterFile:
    """Reads a .safetensors file or a PEFT folder.

    Raises ModelError if it is missing, damaged, hostile, not an adapter, or of an unknown kind.
    """
    if path.is_dir():
        return _read_peft_folder(path)
    if not path.is_file():
        raise ModelError(f"There is no adapter file {path.name}.")
    metadata = read_header(path).metadata
    tensors = _load(path)
    grouped, formats = _group(path, tensors)
    modules, notes = _modules(path, grouped, scales_of_header(path, metadata))
    # The files of this program have the whole scale in B if they have no alpha.
    if "atelier_version" in metadata:
        notes = []
    if len(formats) > 1:
        notes.append(f"It mixes the formats {' and '.join(sorted(formats))}.")
    file_format = formats.most_common(1)[0][0]
    return AdapterFile(path, file_format, modules, metadata, _dtype(tensors), notes)


def _read_peft_folder(path: Path) -> AdapterFile:
    """Reads the folder of one component, or a folder with one subfolder for each component."""
    if (path / PEFT_CONFIG).is_file():
        folders = {path.name: path}
    else:
        folders = {c: path / c for c in COMPONENTS if (path / c / PEFT_CONFIG).is_file()}
    if not folders:
        raise ModelError(f"{path.name} is not an adapter: the folder has no {PEFT_CONFIG}.")
    modules: list[AdaptedModule] = []
    notes: list[str] = []
    metadata: dict[str, str] = {}
    dtype = ""
    for name, folder in folders.items():
        if not (folder / PEFT_WEIGHTS).is_file():
            raise ModelError(
                f"{path.name} has no {PEFT_WEIGHTS}. Other formats can run code when opened, "
                "so they are not read. Save the adapter as .safetensors."
            )
        tensors = _load(folder / PEFT_WEIGHTS)
        metadata |= read_header(folder / PEFT_WEIGHTS).metadata
        grouped, _ = _group(path, tensors, component=name if name in COMPONENTS else "")
        scales = {"": scales_of_folder(folder / PEFT_CONFIG)}
        component_modules, component_notes = _modules(path, grouped, scales)
        modules += component_modules
        notes += component_notes
        dtype = _dtype(tensors)
    return AdapterFile(path, "peft", modules, metadata, dtype, notes)


def _load(path: Path) -> dict[str, Tensor]:
    header = read_header(path)
    if not any(parse_key(name) for name in header.tensors):
        raise ModelError(
            f"{path.name} is not a LoRA: none of its {len(header.tensors)} tensors belongs to a "
            "low-rank pair."
        )
    tensors: dict[str, Tensor] = load_file(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(".alpha"):
            raise ModelError(
                f"{path.name} contains whole numbers instead of weights (in {name}). "
                "Save it in fp16 or fp32."
            )
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(
                f"{path.name} contains numbers that are not finite (in {name}). "
                "It would only generate black images."
            )
    return tensors


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    dtypes: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        if not name.endswith(".alpha"):
            dtypes[tensor.dtype] += 1
    return str(dtypes.most_common(1)[0][0]).removeprefix("torch.")


def _group(
    path: Path, tensors: Mapping[str, Tensor], component: str = ""
) -> tuple[GroupedTensors, Counter[str]]:
    """Returns the tensors by module, and the number of tensors in each format.

    `component` is used for PEFT's keys, which do not contain it.
    """
    grouped: GroupedTensors = {}
    formats: Counter[str] = Counter()
    for name, tensor in tensors.items():
        key = parse_key(name)
        if key is None:
            raise ModelError(
                f"{path.name} contains more than a LoRA, LoHa, LoKr or DoRA: {name[:120]} is of "
                "a kind that is not supported, and the adapter would not work without it."
            )
        owner = key.component or component or _guess_component(key.module)
        leaves = grouped.setdefault((owner, key.module), {})
        if key.leaf in leaves:
            raise ModelError(
                f"{path.name} contains {key.leaf} of {key.module} twice, under different names. "
                "It is damaged."
            )
        weights = tensor.float()
        # PEFT has its own shapes for the norms of a DoRA's outputs. In LyCORIS such a shape
        # would mean norms of the inputs.
        if key.leaf == "dora_scale" and key.file_format != "kohya":
            weights = weights.flatten()
        leaves[key.leaf] = weights
        formats[key.file_format] += key.leaf != "alpha"
    return grouped, formats


def _guess_component(module: str) -> str:
    """Returns the component of a PEFT key, if neither the key nor the folder contains it."""
    if "encoder.layers." in module:
        return "text_encoder"
    return "unet" if module.startswith(UNET_PREFIXES) else "transformer"


def _modules(
    path: Path, grouped: GroupedTensors, scales: Mapping[str, Scales]
) -> tuple[list[AdaptedModule], list[str]]:
    """Returns the modules and notes about what was assumed.

    `scales` are the settings beside the tensors by component; "" stands for all components.
    """
    modules: list[AdaptedModule] = []
    without_alpha = 0
    for (component, name), tensors in grouped.items():
        kind = _kind(path, name, tensors)
        alpha = tensors.pop("alpha", None)
        scalar = tensors.pop("scalar", torch.ones(()))
        module = AdaptedModule(component, name, kind, tensors, 1.0)
        _check_shapes(path, module)
        scale = _scale(path, module, alpha, scales.get(component) or scales.get(""))
        if scale is None:
            scale = 1.0
            without_alpha += 1
        if "dora_scale" in tensors and tensors["dora_scale"].dim() == 1:
            kernel = [1] * (module.to("meta").delta.dim() - 1)
            tensors["dora_scale"] = tensors["dora_scale"].reshape(-1, *kernel)
        modules += _split_fused(replace(module, scale=scale * float(scalar)))
    if not without_alpha:
        return modules, []
    some = f"{without_alpha} of its modules have no alpha"
    subject = "It has no alpha" if without_alpha == len(grouped) else some
    return modules, [
        f"{subject}; alpha = rank is assumed, as in diffusers. "
        "If the adapter is too strong, its trainer used another alpha."
    ]


def _kind(path: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    for kind, required in REQUIRED_TENSORS.items():
        if any(leaf in tensors for leaf in required):
            return kind
    raise ModelError(
        f"{path.name} has no low-rank pair for {name}, only {', '.join(sorted(tensors))[:80]}. "
        "It is damaged."
    )


def _scale(
    path: Path, module: AdaptedModule, alpha: Tensor | None, scales: Scales | None
) -> float | None:
    """Returns the scale by the alpha in the file, else by PEFT's settings, else None."""
    if alpha is None:
        return None if scales is None else scales.scale_of(module.name, module.rank or 1)
    if alpha.numel() != 1:
        raise ModelError(
            f"{path.name} has an alpha of {alpha.numel()} numbers for {module.name} instead of "
            "one. It is damaged."
        )
    # A LoKr with two full factors has no rank. Every reader then takes the scale as 1.
    return float(alpha) / module.rank if module.rank else 1.0


def _check_shapes(path: Path, module: AdaptedModule) -> None:
    """Raises ModelError if the tensors cannot be multiplied. Uses tensors without content."""
    try:
        delta = module.to("meta").delta
        magnitude = module.tensors.get("dora_scale")
        if magnitude is not None and magnitude.numel() not in delta.shape:
            raise ValueError("dora_scale")
        if delta.numel() > MAX_WEIGHTS:
            raise ValueError(f"{delta.numel():,} weights")
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        raise ModelError(
            f"The tensors of {module.name} in {path.name} do not fit together "
            f"({str(error)[:100]}). The file is damaged."
        ) from None


def _split_fused(module: AdaptedModule) -> list[AdaptedModule]:
    """Splits a fused projection of Stability's MMDiT into the q, k and v of diffusers.

    Each of the three gets the whole A and a third of B.
    """
    block, _, inside = module.name.partition(".x_block.")
    if not inside:
        block, _, inside = module.name.partition(".context_block.")
    fused = module.name.removeprefix(f"{block}.")
    if fused not in MMDIT_FUSED:
        return [module]
    leaves = {"lora": (UP,), "loha": ("hada_w1_a", "hada_w2_a")}.get(module.kind, ())
    if not leaves or module.tensors[leaves[0]].shape[0] % 3:
        raise ModelError(
            f"The fused projection {module.name} cannot be split into q, k and v: "
            f"a {module.kind} of this shape is not supported."
        )
    parts = []
    for index, name in enumerate(MMDIT_FUSED[fused]):
        tensors = dict(module.tensors)
        for leaf in (*leaves, "dora_scale"):
            if leaf in tensors:
                tensors[leaf] = tensors[leaf].chunk(3)[index].contiguous()
        part = replace(module, name=f"{block}.{name}", tensors=tensors)
        parts.append(_without_idle_ranks(part))
    return parts


def _without_idle_ranks(module: AdaptedModule) -> AdaptedModule:
    """Removes ranks whose B is zero: in a fused file of three adapters two thirds of them are."""
    if module.kind != "lora":
        return module
    down, up = module.tensors[DOWN], module.tensors[UP]
    used = up.flatten(1).any(dim=0)
    if used.all() or not used.any():
        return module
    return replace(module, tensors=module.tensors | {DOWN: down[used], UP: up[:, used]})
