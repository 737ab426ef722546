"""The tensors of an adapter in each file format. Keys and scales follow docs/formats.md.

The converters of diffusers and PEFT write keys or alphas that other programs ignore.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ModelError
from trainer.families.base import ModelFamily
from trainer.lora.formats.adapted_module import DOWN, MID, UP, AdaptedModule, common_alpha
from trainer.lora.formats.keys import diffusers_key
from trainer.models.pipelines import PIPELINES

MIN_PEAK_IN_FP16 = 2.0**-10
"""Largest number of a factor below which fp16 would lose precision.

Below 2^-14 its numbers are whole multiples of 2^-24.
"""
SCALED_FACTORS = {"lora": (UP,), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}
"""The factor into which a scale is multiplied, by kind. A LoKr has one of the two."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def to_kohya(
    modules: Iterable[AdaptedModule], family: ModelFamily, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns LyCORIS's tensors with the key of each module as prefix.

    All modules have the same alpha, because some readers use only one. If the scale of a module
    is not alpha / rank, the difference is multiplied into one of its factors, in float32.
    """
    modules = _with_complete_attentions(_with_fused_projections(modules, family), family)
    alpha = common_alpha(modules)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        key = family.kohya_key(module.component, module.name)
        # A LoKr with two full factors has no rank, and readers take its scale as 1.
        factor = module.scale * module.rank / alpha if module.rank else module.scale
        for leaf, tensor in _to_dtype(scaled(module, factor).tensors, dtype).items():
            tensors[f"{key}.{leaf}"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def to_diffusers(
    modules: Iterable[AdaptedModule], family: ModelFamily, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns A and B with the keys of diffusers.

    The file has no alpha. The whole scale is in B, so a reader's default scale of 1 is right.
    """
    tensors: dict[str, Tensor] = {}
    for module in modules:
        key = diffusers_key(module.component, module.name)
        pair = _to_dtype(_scaled_pair(module, "diffusers"), dtype)
        tensors |= {f"{key}.lora_A.weight": pair[DOWN], f"{key}.lora_B.weight": pair[UP]}
        if "dora_scale" in module.tensors:
            # The loader for text encoders, from transformers, requires the name of the
            # parameter. The loader of diffusers refuses it.
            end = ".weight" if module.component.startswith("text_encoder") else ""
            tensors[f"{key}.lora_magnitude_vector{end}"] = _peft_magnitude(module)
    return tensors


def to_peft(
    modules: Iterable[AdaptedModule], family: ModelFamily, dtype: torch.dtype
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Returns the tensors and adapter_config.json of each component.

    For `PeftModel.from_pretrained(pipe.unet, folder / "unet")`.
    """
    by_component: dict[str, list[AdaptedModule]] = {}
    for module in modules:
        by_component.setdefault(module.component, []).append(module)
    parts = {}
    for component, own_modules in by_component.items():
        kinds = {_stored_kind(module) for module in own_modules}
        if len(kinds) > 1 or "lokr" in kinds:
            raise ModelError(
                f"A PEFT folder cannot contain {' and '.join(sorted(kinds))} exactly. "
                "Choose the format kohya, or resize the adapter to a LoRA first."
            )
        is_loha = kinds == {"loha"}
        names = [_peft_name(component, module.name, family) for module in own_modules]
        tensors: dict[str, Tensor] = {}
        for name, module in zip(names, own_modules, strict=True):
            tensors |= _peft_tensors(f"base_model.model.{name}", module, is_loha, dtype)
        parts[component] = tensors, _peft_config(names, own_modules, is_loha)
    return parts


def _peft_tensors(
    key: str, module: AdaptedModule, is_loha: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    if is_loha:
        factors = _to_dtype(scaled(module, module.scale).tensors, dtype)
        tensors = {f"{key}.{leaf}": tensor for leaf, tensor in factors.items()}
    else:
        pair = _to_dtype(_scaled_pair(module, "peft"), dtype)
        tensors = {f"{key}.lora_A.weight": pair[DOWN], f"{key}.lora_B.weight": pair[UP]}
    if "dora_scale" in module.tensors:
        tensors[f"{key}.lora_magnitude_vector"] = _peft_magnitude(module)
    return tensors


def _peft_config(names: list[str], modules: list[AdaptedModule], is_loha: bool) -> dict[str, Any]:
    """Returns the settings with alpha = rank everywhere, because the scale is in the tensors."""
    ranks = {name: module.rank for name, module in zip(names, modules, strict=True)}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    exceptions = {name: own_rank for name, own_rank in ranks.items() if own_rank != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "rank_pattern": exceptions,
        "alpha_pattern": exceptions,
        "target_modules": sorted(ranks),
    }
    if is_loha:
        return config | {
            "peft_type": "LOHA",
            "alpha": rank,
            "use_effective_conv2d": any("hada_t1" in module.tensors for module in modules),
        }
    return config | {
        "lora_alpha": rank,
        "use_dora": any("dora_scale" in module.tensors for module in modules),
        "bias": "none",
        "init_lora_weights": True,
    }


def _peft_name(component: str, name: str, family: ModelFamily) -> str:
    """Returns the path of a module in the installed version of transformers.

    Text encoders with a projection have the level `text_model`. Those without a projection lost
    it in transformers 5.6.
    """
    if not component.startswith("text_encoder"):
        return name
    bare = name.removeprefix("text_model.")
    classes = PIPELINES[family.pipeline_class.__name__].get(component, set())
    has_projection = any(class_name.endswith("WithProjection") for _, class_name in classes)
    return f"text_model.{bare}" if has_projection and bare != "text_projection" else bare


def scaled(module: AdaptedModule, factor: float) -> AdaptedModule:
    """Returns the module with a factor multiplied into its tensors. Its `scale` stays the same."""
    leaf = next(leaf for leaf in SCALED_FACTORS[_stored_kind(module)] if leaf in module.tensors)
    return replace(module, tensors=module.tensors | {leaf: module.tensors[leaf] * factor})


def _stored_kind(module: AdaptedModule) -> str:
    """Returns "lora" for a DoRA too, which is a LoRA with norms, else the kind."""
    return "lora" if DOWN in module.tensors else module.kind


def _to_dtype(factors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the factors of a delta W in the dtype of the file.

    After few steps B is too small for fp16. Then the largest factor lends it a power of two,
    which does not change the product. The norms of a DoRA stay in float32: they multiply all of
    W, so an error of rounding would be as large as the learned change.
    """
    peaks = {}
    for leaf, tensor in factors.items():
        if leaf != "dora_scale":
            peaks[leaf] = float(tensor.abs().max())
    smallest, largest = min(peaks, key=peaks.__getitem__), max(peaks, key=peaks.__getitem__)
    balanced = dict(factors)
    is_small = 0 < peaks[smallest] < MIN_PEAK_IN_FP16
    if dtype == torch.float16 and is_small and math.isfinite(peaks[largest]):
        power = 2.0 ** round(math.log2(peaks[largest] / peaks[smallest]) / 2)
        balanced[smallest] = factors[smallest] * power
        balanced[largest] = factors[largest] / power
    return {
        leaf: tensor.to(torch.float32 if leaf == "dora_scale" else dtype).contiguous()
        for leaf, tensor in balanced.items()
    }


def _scaled_pair(module: AdaptedModule, file_format: str) -> dict[str, Tensor]:
    """Returns A and B. B contains the scale, and A the core if the pair has Tucker's form."""
    if DOWN not in module.tensors:
        raise ModelError(
            f"The format {file_format} cannot contain a {module.kind}. "
            "Choose kohya, or resize the adapter to a LoRA first."
        )
    down, up = module.tensors[DOWN], module.tensors[UP] * module.scale
    if MID in module.tensors:
        down = torch.einsum("rsij,sc->rcij", module.tensors[MID], down.flatten(1))
    return {DOWN: down, UP: up}


def _peft_magnitude(module: AdaptedModule) -> Tensor:
    """Returns the norms of a DoRA in PEFT's shape: [out], or [1, out, 1, 1] for a convolution."""
    norms = module.tensors["dora_scale"].float()
    if norms.shape[0] != module.tensors[UP].shape[0]:
        raise ModelError(
            f"The DoRA on {module.name} has one norm per input, which only the format kohya can "
            "contain."
        )
    return norms.flatten() if norms.dim() <= 2 else norms.reshape(1, -1, 1, 1)


def _with_complete_attentions(
    modules: Iterable[AdaptedModule], family: ModelFamily
) -> list[AdaptedModule]:
    """Adds modules with a B of zero to each attention of OpenCLIP that is adapted in part.

    A1111 fuses q, k, v and out of these encoders, and ignores an attention that lacks one of
    them. A DoRA is not padded, because its norms depend on the base.
    """
    modules = list(modules)
    if any("dora_scale" in module.tensors for module in modules):
        return modules
    present = {(module.component, module.name) for module in modules}
    padded = []
    for module in modules:
        padded.append(module)
        attention, _, projection = module.name.rpartition(".")
        if module.component not in family.open_clip_encoders or projection not in TEXT_ATTENTION:
            continue
        for other in TEXT_ATTENTION:
            key = (module.component, f"{attention}.{other}")
            if key not in present:
                present.add(key)
                padded.append(_idle_copy(module, f"{attention}.{other}"))
    return padded


def _idle_copy(module: AdaptedModule, name: str) -> AdaptedModule:
    """Returns a LoRA of the same shape and rank that changes nothing."""
    outputs, inputs = module.to("meta").delta.shape
    rank = module.rank or 1
    tensors = {DOWN: torch.zeros(rank, inputs), UP: torch.zeros(outputs, rank)}
    return AdaptedModule(module.component, name, "lora", tensors, module.scale)


def _with_fused_projections(
    modules: Iterable[AdaptedModule], family: ModelFamily
) -> list[AdaptedModule]:
    """Combines q, k and v if the family's own code has them in one projection."""
    result: list[AdaptedModule] = []
    fused: dict[str, dict[int, AdaptedModule]] = {}
    for module in modules:
        path, index = module.name, None
        if module.component == family.denoiser_name:
            path, index = family.fused_projection(module.name)
        if index is None:
            result.append(replace(module, name=path))
        else:
            fused.setdefault(path, {})[index] = module
    for path, parts in fused.items():
        result.append(_fuse(path, parts, family))
    return result


def _fuse(path: str, parts: Mapping[int, AdaptedModule], family: ModelFamily) -> AdaptedModule:
    """Combines up to three projections: A's below each other, B's along a diagonal.

    `parts` are q, k and v by the index 0, 1 and 2. A missing one gets no ranks.
    """
    for part in parts.values():
        if _stored_kind(part) != "lora" or part.tensors[DOWN].dim() != 2:
            raise ModelError(
                f"The kohya format of {family.name} fuses q, k and v, which is possible for LoRA "
                "only. Choose another format."
            )
    outputs = next(iter(parts.values())).tensors[UP].shape[0]
    downs, ups, norms = [], [], []
    for index in range(3):
        if index not in parts:
            ups.append(torch.zeros(outputs, 0))
            continue
        part = parts[index]
        downs.append(part.tensors[DOWN])
        ups.append(part.tensors[UP] * part.scale)
        if "dora_scale" in part.tensors:
            norms.append(part.tensors["dora_scale"])
    if norms and len(norms) < len(ups):
        raise ModelError(
            f"The kohya format of {family.name} fuses q, k and v, but the DoRA is on a part of "
            "them only. Choose another format."
        )
    tensors = {DOWN: torch.cat(downs), UP: torch.block_diag(*ups)}
    if norms:
        tensors["dora_scale"] = torch.cat(norms)
    return AdaptedModule(family.denoiser_name, path, "lora", tensors, 1.0)
