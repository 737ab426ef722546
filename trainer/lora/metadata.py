"""The metadata in an adapter file, and what it leaves out to protect privacy.

It has sd-scripts' ss_* keys, Stability's modelspec 1.0.1, and keys of this program.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from trainer import __version__
from trainer.config import RunConfig
from trainer.config.presets import load_presets
from trainer.families.base import ModelFamily
from trainer.lora.formats.adapted_module import AdaptedModule, common_alpha
from trainer.lora.formats.reader import AdapterFile

THUMBNAIL_SIDE = 256
"""Pixels of the longer side."""
PLAIN_CAPTION_TOKENS = 75
"""The prompt length that needs no mention: the context of one CLIP chunk."""
DATASET_PATHS = ("folder", "regularisation_folder")
MODEL_PATHS = (("base", "model"), ("base", "vae"), ("adapter", "start_from"))


def metadata_for(
    run: RunConfig,
    family: ModelFamily,
    *,
    modules: Sequence[AdaptedModule],
    step: int,
    total_steps: int,
    sizes: Sequence[tuple[int, int]],
    captions: Sequence[str],
    base_hash: str,
    prediction_type: str,
    started: float,
    finished: float,
) -> dict[str, str]:
    """Returns the metadata of a trained adapter. Every value is a string.

    `sizes` are the width and height of each training image after its crop, in pixels. `started`
    and `finished` are Unix times.

    The metadata never contains the home folder or tokens. The settings `saving.include_*` decide
    about captions, folders and the other settings.
    """
    values: dict[str, Any] = {
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        **family.metadata(prediction_type),
        **network(modules),
        "ss_network_dim": _common_rank(modules) if modules else run.adapter.rank,
        "ss_network_alpha": common_alpha(modules) if modules else run.adapter.alpha,
        **_training_settings(run),
        "ss_sd_model_hash": base_hash,
        "ss_num_train_images": len(sizes),
        "ss_bucket_info": json.dumps(bucket_info(sizes)),
        "ss_steps": step,
        "ss_max_train_steps": total_steps,
        "ss_training_started_at": started,
        "ss_training_finished_at": finished,
        **_modelspec(run, prediction_type, finished),
        **_own_keys(run),
        **_dataset_keys(run, captions, len(sizes)),
    }
    return {key: str(value) for key, value in values.items()}


def _training_settings(run: RunConfig) -> dict[str, Any]:
    """Returns the settings that sd-scripts writes too, under its keys."""
    training, dataset, objective = run.training, run.dataset, run.objective
    clip_skip, tokens = run.base.clip_skip, dataset.caption_tokens
    return {
        "ss_network_dropout": run.adapter.dropout,
        "ss_output_name": run.name,
        "ss_sd_model_name": Path(run.base.model).name,
        "ss_resolution": f"({dataset.resolution}, {dataset.resolution})",
        "ss_clip_skip": clip_skip if clip_skip > 1 else None,
        "ss_max_token_length": tokens if tokens > PLAIN_CAPTION_TOKENS else None,
        "ss_batch_size_per_device": training.batch_size,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_learning_rate": training.learning_rate,
        "ss_unet_lr": training.learning_rate,
        "ss_text_encoder_lr": training.text_encoder_learning_rate,
        "ss_scale_weight_norms": run.adapter.max_norm or None,
        "ss_optimizer": training.optimizer,
        "ss_lr_scheduler": training.lr_schedule,
        "ss_seed": training.seed,
        "ss_min_snr_gamma": objective.min_snr_gamma,
        "ss_noise_offset": objective.noise_offset,
        "ss_caption_dropout_rate": dataset.caption_dropout,
    }


def _modelspec(run: RunConfig, prediction_type: str, finished: float) -> dict[str, str]:
    side, base_name = run.dataset.resolution, Path(run.base.model).name
    values = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": run.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "modelspec.date": datetime.fromtimestamp(finished, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.usage_hint": f"Trained on {base_name}. Start at strength 0.8 to 1.",
    }
    if run.dataset.trigger:
        values["modelspec.trigger_phrase"] = run.dataset.trigger
    return values


def _own_keys(run: RunConfig) -> dict[str, str]:
    preset = load_presets().get(run.preset)
    values = {
        "atelier_version": __version__,
        "atelier_preset": run.preset,
        "atelier_preset_hash": preset.hash if preset else "",
    }
    if run.saving.include_config:
        values["atelier_config"] = shared_config(run)
    return values


def _dataset_keys(run: RunConfig, captions: Sequence[str], images: int) -> dict[str, str]:
    """Returns the frequency of tags and the dataset's folder, if the settings allow them."""
    saving, values = run.saving, {}
    folder = Path(run.dataset.folder).name if saving.include_folders else "dataset"
    if saving.include_captions:
        frequencies = {folder: tag_frequencies(captions)}
        values["ss_tag_frequency"] = json.dumps(frequencies, ensure_ascii=False)
    if saving.include_folders:
        folders = {folder: {"n_repeats": 1, "img_count": images}}
        values["ss_dataset_dirs"] = json.dumps(folders, ensure_ascii=False)
    return values


def thumbnail(path: Path) -> dict[str, str]:
    """Returns `modelspec.thumbnail`: a small JPEG of an image file as a data URL.

    It does not contain the metadata of the image file.
    """
    image = Image.open(path).convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{encoded}"}


def network(modules: Sequence[AdaptedModule]) -> dict[str, str]:
    """Returns the keys from which other programs read the kind of the adapter.

    LoRA has the name of sd-scripts, and the other kinds have the names of LyCORIS.
    """
    leaves: set[str] = set()
    conv_ranks = []
    for module in modules:
        leaves |= module.tensors.keys()
        if module.rank and any(tensor.dim() == 4 for tensor in module.tensors.values()):
            conv_ranks.append(module.rank)
    arguments = {"conv_dim": str(max(conv_ranks))} if conv_ranks else {}
    algorithm = "lora"
    if "hada_w1_a" in leaves:
        algorithm = "loha"
    elif "lokr_w1" in leaves or "lokr_w1_a" in leaves:
        algorithm = "lokr"
    module_name = "networks.lora"
    if algorithm != "lora" or "dora_scale" in leaves:
        module_name = "lycoris.kohya"
        arguments["algo"] = algorithm
    if "dora_scale" in leaves:
        arguments["dora_wd"] = "True"
    return {"ss_network_module": module_name, "ss_network_args": json.dumps(arguments)}


def bucket_info(sizes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Returns the number of images of each size, in the structure of sd-scripts."""
    buckets = {}
    for index, (size, count) in enumerate(sorted(Counter(sizes).items())):
        buckets[str(index)] = {"resolution": [*size], "count": count}
    return {"buckets": buckets}


def shared_config(run: RunConfig) -> str:
    """Returns the settings as JSON, from which the run can be repeated.

    Without `saving.include_folders` it contains no folder of the dataset and only the names of
    model files. Without `saving.include_captions` it contains no prompts.
    """
    data = run.model_dump(mode="json")
    dataset, sampling = data["dataset"], data["sampling"]
    if run.saving.include_folders:
        for name in DATASET_PATHS:
            dataset[name] = _without_home(dataset[name])
        for section, name in MODEL_PATHS:
            data[section][name] = _without_home(data[section][name])
    else:
        for name in DATASET_PATHS:
            dataset[name] = ""
        dataset["repeats"] = []  # its entries are names of folders
        # A relative path may be an id on the Hugging Face Hub, which is public.
        for section, name in MODEL_PATHS:
            path = Path(data[section][name])
            if path.is_absolute():
                data[section][name] = path.name
    if not run.saving.include_captions:
        sampling.update(prompts=[], negative_prompt="")
    return json.dumps(data, ensure_ascii=False)


def _without_home(path: str) -> str:
    home = str(Path.home())
    return path.replace(home, "~", 1) if path.startswith(home) else path


def tag_frequencies(captions: Iterable[str]) -> dict[str, int]:
    """Returns the number of occurrences of each comma-separated part, most frequent first."""
    counts: Counter[str] = Counter()
    for caption in captions:
        tags = (part.strip() for part in caption.split(","))
        counts.update(tag for tag in tags if tag)
    return dict(counts.most_common())


def metadata_of_tool(
    name: str, modules: Sequence[AdaptedModule], files: Sequence[AdapterFile], family: ModelFamily
) -> dict[str, str]:
    """Returns the metadata of an adapter that was made from other adapter files.

    It contains the names of the files and the metadata that they have in common. A single file
    passes on all of it except hashes and the thumbnail.
    """
    common: dict[str, Any] = family.metadata("epsilon")
    if files:
        common = dict(set.intersection(*(set(file.metadata.items()) for file in files)))
    # The thumbnail shows images of another adapter, and PEFT's settings contain its alphas.
    outdated = ("modelspec.thumbnail", "lora_adapter_metadata")
    passed_on = {}
    for key, value in common.items():
        is_hash = "hash" in key and not key.startswith("atelier")
        if not is_hash and key not in outdated:
            passed_on[key] = value
    own = {
        **network(modules),
        "ss_network_dim": _common_rank(modules),
        "ss_network_alpha": common_alpha(modules),
        "ss_output_name": name,
        "modelspec.title": name,
        "atelier_made_from": ", ".join(file.path.stem for file in files),
        "atelier_version": __version__,
    }
    return {key: str(value) for key, value in (passed_on | own).items()}


def _common_rank(modules: Sequence[AdaptedModule]) -> int | None:
    """Returns the most frequent rank. None means that most are a LoKr with two full factors."""
    return Counter(module.rank for module in modules).most_common(1)[0][0]
