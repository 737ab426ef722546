"""The tensors of an adapter in each file format."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ModelError
from trainer.families.base import ModelFamily
from trainer.lora.formats.adapted_module import AdaptedModule, common_alpha
from trainer.lora.formats.keys import diffusers_key
from trainer.models import model_files

SMALL_IN_FP16 = 2.0**-10  # whose numbers are whole multiples of 2^-24 below 2^-14


DOWN, UP = "lora_down.weight", "lora_up.weight"


# The factor that takes up a scale, by kind.
SCALED = {"lora": (UP,), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a")}


ENCODER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def to_kohya(
    modules: Iterable[AdaptedModule], family: ModelFamily, dtype: torch.dtype
) -> dict[str, Tensor]:
    """LyCORIS's tensors behind each module's key, and one value of alpha for the whole file, since some readers look at one only.

    Where a module's scale is not alpha / rank the difference is folded into one of its factors, in float32.
    """
    modules = _with_whole_attentions(_fused(modules, family), family)
    alpha = common_alpha(modules)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        key = family.export_key(module.component, module.name)
        # A LoKr of two whole factors has no rank, and readers take its scale as 1.
        folded = fold(module, module.scale * module.rank / alpha if module.rank else module.scale)
        tensors |= {
            f"{key}.{leaf}": tensor for leaf, tensor in _rounded(folded.tensors, dtype).items()
        }
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _rounded(factors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of a delta W in a file's number format.

    After a few steps B is smaller than fp16 can tell apart; then the largest factor lends it a power of two, which leaves the product as
    it is. The lengths of a DoRA stay exact: they multiply all of W, so their rounding would be as large as what was learned.
    """
    peaks = {
        leaf: float(tensor.abs().max()) for leaf, tensor in factors.items() if leaf != "dora_scale"
    }
    smallest, largest = min(peaks, key=peaks.__getitem__), max(peaks, key=peaks.__getitem__)
    lent = {}
    if (
        dtype == torch.float16
        and 0 < peaks[smallest] < SMALL_IN_FP16
        and math.isfinite(peaks[largest])
    ):
        power = 2.0 ** round(math.log2(peaks[largest] / peaks[smallest]) / 2)
        lent = {smallest: factors[smallest] * power, largest: factors[largest] / power}
    return {
        leaf: tensor.to(torch.float32 if leaf == "dora_scale" else dtype).contiguous()
        for leaf, tensor in ({**factors, **lent}).items()
    }


def fold(module: AdaptedModule, factor: float) -> AdaptedModule:
    """The factor multiplied into the tensors. The scale is left as it is: what it means from now on is the caller's affair."""
    leaf = next(leaf for leaf in SCALED[_pair_kind(module)] if leaf in module.tensors)
    return replace(module, tensors=module.tensors | {leaf: module.tensors[leaf] * factor})


def _pair_kind(module: AdaptedModule) -> str:
    return "lora" if DOWN in module.tensors else module.kind


def _with_whole_attentions(
    modules: Iterable[AdaptedModule], family: ModelFamily
) -> list[AdaptedModule]:
    """A1111 fuses q, k, v and out of OpenCLIP's encoders and passes over an attention that lacks one: the missing ones get a zero B.

    A DoRA cannot be padded, since its lengths are those of the base.
    """
    modules = list(modules)
    if any("dora_scale" in module.tensors for module in modules):
        return modules
    there = {(module.component, module.name) for module in modules}
    padded = []
    for module in modules:
        padded.append(module)
        attention, _, projection = module.name.rpartition(".")
        if module.component not in family.open_clip or projection not in ENCODER_PROJECTIONS:
            continue
        for missing in ENCODER_PROJECTIONS:
            name = f"{attention}.{missing}"
            if (module.component, name) not in there:
                there.add((module.component, name))
                outputs, inputs = module.to("meta").delta.shape
                tensors = {
                    DOWN: torch.zeros(module.rank or 1, inputs),
                    UP: torch.zeros(outputs, module.rank or 1),
                }
                padded.append(AdaptedModule(module.component, name, "lora", tensors, module.scale))
    return padded


def _fused(modules: Iterable[AdaptedModule], family: ModelFamily) -> list[AdaptedModule]:
    """q, k and v as the one projection that the family's own code has there: A's under each other, B's along a diagonal."""
    whole: list[AdaptedModule] = []
    thirds: dict[str, dict[int, AdaptedModule]] = {}
    for module in modules:
        path, third = (
            family.fused(module.name)
            if module.component == family.denoiser_name
            else (module.name, None)
        )
        if third is None:
            whole.append(replace(module, name=path))
        else:
            thirds.setdefault(path, {})[third] = module
    for path, parts in thirds.items():
        if any(
            _pair_kind(part) != "lora" or part.tensors[DOWN].dim() != 2 for part in parts.values()
        ):
            raise ModelError(
                f"kohya's dialect of {family.name} fuses q, k and v, which only LoRA allows; choose another dialect."
            )
        outputs = next(iter(parts.values())).tensors[UP].shape[0]
        ups = [
            p.tensors[UP] * p.scale if (p := parts.get(i)) else torch.zeros(outputs, 0)
            for i in range(3)
        ]
        tensors = {
            DOWN: torch.cat([parts[i].tensors[DOWN] for i in sorted(parts)]),
            UP: torch.block_diag(*ups),
        }
        lengths = [
            parts[i].tensors["dora_scale"]
            for i in sorted(parts)
            if "dora_scale" in parts[i].tensors
        ]
        if lengths and len(lengths) < len(ups):
            raise ModelError(
                f"A DoRA on a part of q, k and v cannot be fused for kohya's dialect of {family.name}; choose another dialect."
            )
        if lengths:
            tensors["dora_scale"] = torch.cat(lengths)
        whole.append(AdaptedModule(family.denoiser_name, path, "lora", tensors, 1.0))
    return whole


def to_diffusers(
    modules: Iterable[AdaptedModule], family: ModelFamily, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Pairs under the names of diffusers. There is no alpha: the whole scale is in B, so that every reader's default of 1 is right."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        name = diffusers_key(module.component, module.name)
        pair = _rounded(_plain_pair(module, "diffusers"), dtype)
        tensors |= {f"{name}.lora_A.weight": pair[DOWN], f"{name}.lora_B.weight": pair[UP]}
        if "dora_scale" in module.tensors:
            # The text encoders' loader, transformers', asks for the parameter by name; diffusers' own refuses that.
            end = ".weight" if module.component.startswith("text_encoder") else ""
            tensors[f"{name}.lora_magnitude_vector{end}"] = _magnitude(module)
    return tensors


def _plain_pair(module: AdaptedModule, dialect: str) -> dict[str, Tensor]:
    """A and B with the scale in B and Tucker's core in A."""
    if DOWN not in module.tensors:
        raise ModelError(
            f"A {module.kind} has no form in the {dialect} dialect. Choose kohya, or resize it to a LoRA first."
        )
    down, up = module.tensors[DOWN], module.tensors[UP] * module.scale
    if "lora_mid.weight" in module.tensors:
        down = torch.einsum("rsij,sc->rcij", module.tensors["lora_mid.weight"], down.flatten(1))
    return {DOWN: down, UP: up}


def _magnitude(module: AdaptedModule) -> Tensor:
    """The lengths in PEFT's shape: [out], for a convolution [1, out, 1, 1]. LyCORIS's [1, in] has no form there."""
    lengths = module.tensors["dora_scale"].float()
    if lengths.shape[0] != module.tensors[UP].shape[0]:
        raise ModelError(
            f"The DoRA on {module.name} has lengths by input, which only kohya's dialect has a form for."
        )
    return lengths.flatten() if lengths.dim() <= 2 else lengths.reshape(1, -1, 1, 1)


def to_peft(
    modules: Iterable[AdaptedModule], family: ModelFamily, dtype: torch.dtype
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors and adapter_config.json by component, for `PeftModel.from_pretrained(pipe.unet, folder / "unet")`."""
    parts: dict[str, list[AdaptedModule]] = {}
    for module in modules:
        parts.setdefault(module.component, []).append(module)
    return {
        component: _peft_part(component, found, family, dtype) for component, found in parts.items()
    }


def _peft_part(
    component: str, modules: list[AdaptedModule], family: ModelFamily, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int | None] = {}
    kinds = {_pair_kind(module) for module in modules}
    if len(kinds) > 1 or "lokr" in kinds:
        raise ModelError(
            f"PEFT's folder has no exact form for {' and '.join(sorted(kinds))}. Choose kohya, or resize it to a LoRA first."
        )
    for module in modules:
        name = _name_in_transformers(component, module.name, family)
        key = f"base_model.model.{name}"
        if "loha" in kinds:
            factors = _rounded(fold(module, module.scale).tensors, dtype)
            tensors |= {f"{key}.{leaf}": tensor for leaf, tensor in factors.items()}
        else:
            pair = _rounded(_plain_pair(module, "peft"), dtype)
            tensors |= {f"{key}.lora_A.weight": pair[DOWN], f"{key}.lora_B.weight": pair[UP]}
        if "dora_scale" in module.tensors:
            tensors[f"{key}.lora_magnitude_vector"] = _magnitude(module)
        ranks[name] = module.rank
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != rank}
    # The scale is in the tensors, so alpha = rank everywhere.
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }
    if "loha" in kinds:
        effective = any("hada_t1" in module.tensors for module in modules)
        return tensors, config | {
            "peft_type": "LOHA",
            "alpha": rank,
            "use_effective_conv2d": effective,
        }
    dora = any("dora_scale" in module.tensors for module in modules)
    return tensors, config | {
        "lora_alpha": rank,
        "use_dora": dora,
        "bias": "none",
        "init_lora_weights": True,
    }


def _name_in_transformers(component: str, name: str, family: ModelFamily) -> str:
    """Encoders with a projection kept the level `text_model`, those without lost it in transformers 5.6."""
    if not component.startswith("text_encoder"):
        return name
    bare = name.removeprefix("text_model.")
    classes = model_files.PIPELINES[family.pipeline_class.__name__].get(component, set())
    has_projection = any(name.endswith("WithProjection") for _, name in classes)
    return f"text_model.{bare}" if has_projection and bare != "text_projection" else bare
