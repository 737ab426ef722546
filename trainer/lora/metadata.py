"""What an adapter file says of itself: sd-scripts' ss_* keys, Stability's modelspec 1.0.1, and our own; and what it keeps to itself."""

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

THUMBNAIL = 256  # pixels of the longer side


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
    """All values are texts. `sizes` are width and height of each training picture as it is cropped, in pixels.

    Never in it: the home folder, tokens, and what `saving.include_*` keeps out.
    """
    training, adapter, side = run.training, run.adapter, run.dataset.resolution
    base_name = Path(run.base.model).name
    values: dict[str, Any] = {
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        **family.metadata(prediction_type),
        **network(modules),
        "ss_network_dim": Counter(module.rank for module in modules).most_common(1)[0][0]
        if modules
        else adapter.rank,
        "ss_network_alpha": common_alpha(modules) if modules else adapter.alpha,
        "ss_network_dropout": adapter.dropout,
        "ss_output_name": run.name,
        "ss_sd_model_name": base_name,
        "ss_sd_model_hash": base_hash,
        "ss_resolution": f"({side}, {side})",
        "ss_clip_skip": run.base.clip_skip if run.base.clip_skip > 1 else "None",
        "ss_max_token_length": run.dataset.caption_tokens
        if run.dataset.caption_tokens > 75
        else "None",
        "ss_num_train_images": len(sizes),
        "ss_bucket_info": json.dumps(bucket_info(sizes)),
        "ss_steps": step,
        "ss_max_train_steps": total_steps,
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
        "ss_min_snr_gamma": run.objective.min_snr_gamma,
        "ss_noise_offset": run.objective.noise_offset,
        "ss_caption_dropout_rate": run.dataset.caption_dropout,
        "ss_training_started_at": started,
        "ss_training_finished_at": finished,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": run.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "modelspec.date": datetime.fromtimestamp(finished, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.usage_hint": f"Trained on {base_name}. Start at strength 0.8 to 1.",
        "atelier_version": __version__,
        "atelier_preset": run.preset,
        "atelier_preset_hash": load_presets()[run.preset].hash
        if run.preset in load_presets()
        else "",
    }
    if run.dataset.trigger:
        values["modelspec.trigger_phrase"] = run.dataset.trigger
    if run.saving.include_config:
        values["atelier_config"] = shared_config(run)
    folder = Path(run.dataset.folder).name if run.saving.include_folders else "dataset"
    if run.saving.include_captions:
        values["ss_tag_frequency"] = json.dumps(
            {folder: tag_frequencies(captions)}, ensure_ascii=False
        )
    if run.saving.include_folders:
        values["ss_dataset_dirs"] = json.dumps(
            {folder: {"n_repeats": 1, "img_count": len(sizes)}}, ensure_ascii=False
        )
    return {key: str(value) for key, value in values.items()}


def thumbnail(picture: Path) -> dict[str, str]:
    """`modelspec.thumbnail`: the picture as a small JPEG in a data address, without what its file says of itself."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return {
        "modelspec.thumbnail": "data:image/jpeg;base64,"
        + base64.b64encode(content.getvalue()).decode("ascii")
    }


def network(modules: Sequence[AdaptedModule]) -> dict[str, str]:
    """By which name other programs know the kind: sd-scripts' own for LoRA, LyCORIS's for its relatives."""
    tensors = {leaf for module in modules for leaf in module.tensors}
    conv = [
        module.rank
        for module in modules
        if module.rank and any(tensor.dim() == 4 for tensor in module.tensors.values())
    ]
    algorithm = next(
        (
            algo
            for algo, leaf in (("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("lokr", "lokr_w1_a"))
            if leaf in tensors
        ),
        "lora",
    )
    arguments: dict[str, str] = {"conv_dim": str(max(conv))} if conv else {}
    if algorithm == "lora" and "dora_scale" not in tensors:
        return {"ss_network_module": "networks.lora", "ss_network_args": json.dumps(arguments)}
    arguments |= {"algo": algorithm, **({"dora_wd": "True"} if "dora_scale" in tensors else {})}
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


def bucket_info(sizes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    counts = Counter(sizes)
    return {
        "buckets": {
            str(i): {"resolution": [*size], "count": counts[size]}
            for i, size in enumerate(sorted(counts))
        }
    }


def shared_config(run: RunConfig) -> str:
    """The settings as JSON, to repeat the run; paths and prompts only where they may be told."""
    data = run.model_dump(mode="json")
    for section, name in (
        ("dataset", "folder"),
        ("dataset", "regularisation_folder"),
        ("base", "model"),
        ("base", "vae"),
        ("adapter", "start_from"),
    ):
        path = Path(data[section][name])
        if run.saving.include_folders:
            data[section][name] = _without_home(data[section][name])
        elif path.is_absolute() or section == "dataset":
            data[section][name] = path.name if section != "dataset" else ""
    if not run.saving.include_folders:
        data["dataset"]["repeats"] = []
    if not run.saving.include_captions:
        data["sampling"].update(prompts=[], negative_prompt="")
    return json.dumps(data, ensure_ascii=False)


def _without_home(path: str) -> str:
    home = str(Path.home())
    return path.replace(home, "~", 1) if path.startswith(home) else path


def tag_frequencies(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs."""
    return dict(
        Counter(
            tag
            for caption in captions
            for tag in (part.strip() for part in caption.split(","))
            if tag
        ).most_common()
    )


def metadata_of_tool(
    name: str, modules: Sequence[AdaptedModule], files: Sequence[AdapterFile], family: ModelFamily
) -> dict[str, str]:
    """Of a file made from others: what they have in common, and their names. A single one hands on all but its hashes and thumbnail."""
    common = (
        dict(set.intersection(*(set(file.metadata.items()) for file in files)))
        if files
        else family.metadata("epsilon")
    )
    own = {
        **network(modules),
        "ss_network_dim": Counter(module.rank for module in modules).most_common(1)[0][0],
        "ss_network_alpha": common_alpha(modules),
        "ss_output_name": name,
        "modelspec.title": name,
        "atelier_made_from": ", ".join(file.path.stem for file in files),
        "atelier_version": __version__,
    }
    passed_on = {
        key: value
        for key, value in common.items()
        if "hash" not in key or key.startswith("atelier")
    }
    passed_on.pop("modelspec.thumbnail", None)  # it shows what the other file draws
    passed_on.pop("lora_adapter_metadata", None)  # its alphas were those of the other file
    return {key: str(value) for key, value in (passed_on | own).items()}
