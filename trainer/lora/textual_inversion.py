"""A trigger word with trained embeddings in the CLIP text encoders, and its file.

Textual inversion (Gal et al. 2022, arXiv:2208.01618) together with an adapter is known as pivotal
tuning, after Roich et al. 2021 (arXiv:2106.05744). The embedding table of the encoder never
changes. The new rows are kept beside it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from tokenizers import AddedToken
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.errors import ConfigError, ModelError
from trainer.families import LoadedBase
from trainer.families.base import ModelFamily, placeholders
from trainer.lora.writer import FILE_ERROR_LIMIT, serialize
from trainer.models.safetensors_header import read_header
from trainer.runs.atomic_files import atomic_write
from trainer.runs.run_folder import embedding_path

LEGACY_EOS_ID = 2
"""The wrong id of the end token in CLIP's published configurations.

With it the encoder takes the pooled output at the token with the highest id.
"""
TRIGGER_KEY = "modelspec.trigger_phrase"


@dataclass(frozen=True)
class Embedding:
    """A word and its embedding vectors for each text encoder."""

    word: str
    rows: Mapping[str, Tensor]
    """[n, width] in float32 by component: {"text_encoder": ..., "text_encoder_2": ...}."""

    @property
    def vectors(self) -> int:
        return len(next(iter(self.rows.values())))


class ExtendedEmbedding(nn.Module):
    """The token embedding of an encoder with additional rows for new token ids."""

    def __init__(self, table: nn.Embedding, words: list[tuple[int, Tensor]]) -> None:
        """`words` are the first token id of each word and its rows."""
        super().__init__()
        self.table = table
        # A list does not register the rows as parameters of the encoder or its adapter.
        self.words = words

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds = self.table(input_ids.clamp(max=self.table.num_embeddings - 1))
        for first_id, rows in self.words:
            index = input_ids - first_id
            own = F.embedding(index.clamp(0, len(rows) - 1), rows).to(embeds.dtype)
            is_own = (index >= 0) & (index < len(rows))
            embeds = torch.where(is_own[..., None], own, embeds)
        return embeds


def with_embeddings(base: LoadedBase, embeddings: Sequence[Embedding]) -> LoadedBase:
    """Returns the base with these embeddings for their words, in place of any earlier ones.

    It shares its modules with the given base. If two embeddings are for one word, the later one
    counts. Rows that require gradients get them. Raises ModelError if an embedding does not fit.
    Then the base does not change.
    """
    by_word = {embedding.word: embedding for embedding in embeddings}
    encoders = _encoders(base)
    for embedding in by_word.values():
        _check_fits(base, embedding, encoders)
    for part, (tokenizer, encoder) in encoders.items():
        words = []
        for word, embedding in by_word.items():
            tokens = placeholders(word, embedding.vectors)
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
            first_id = tokenizer.convert_tokens_to_ids(tokens[0])
            words.append((first_id, embedding.rows[part].to(encoder.device)))
        table = _table(encoder)
        encoder.set_input_embeddings(ExtendedEmbedding(table, words) if words else table)
        # With the legacy id the encoder would take the pooled output at the new word, whose id
        # is higher than the end token's.
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == LEGACY_EOS_ID:
                module.eos_token_id = tokenizer.eos_token_id
    vectors = tuple((word, embedding.vectors) for word, embedding in by_word.items())
    return replace(base, reading=replace(base.reading, words=vectors))


def _check_fits(
    base: LoadedBase, embedding: Embedding, encoders: Mapping[str, tuple[Any, nn.Module]]
) -> None:
    for part, (_, encoder) in encoders.items():
        rows = embedding.rows.get(part)
        if rows is None or rows.shape[1] != _table(encoder).embedding_dim:
            raise ModelError(
                f"The embedding of {embedding.word} does not fit {base.files.path.name}: it is for "
                "another kind of base."
            )


def _table(encoder: nn.Module) -> nn.Embedding:
    """Returns the encoder's original token embedding."""
    table = encoder.get_input_embeddings()
    return table.table if isinstance(table, ExtendedEmbedding) else table


def _encoders(base: LoadedBase) -> dict[str, tuple[Any, nn.Module]]:
    """Returns the tokenizer and encoder of each CLIP text encoder, by its name in the pipeline."""
    encoders = {}
    for part, encoder in base.family.trainable_text_encoders(base.pipe).items():
        tokenizer = getattr(base.pipe, part.replace("text_encoder", "tokenizer"))
        encoders[part] = tokenizer, encoder
    return encoders


def new_trigger_embedding(run: RunConfig, base: LoadedBase) -> Embedding:
    """Returns the trainable embedding of the trigger with which a run starts.

    Its vectors come from the tokens of adapter.trigger_init, or from the embedding file beside
    adapter.start_from. Raises ConfigError if that has another number of vectors, or if the base
    has no CLIP text encoder.
    """
    encoders = _encoders(base)
    if not encoders:
        raise ConfigError(
            f"adapter.trigger_vectors: no CLIP text encoder reads the captions of "
            f"{base.family.name}. Set it to 0."
        )
    vectors = run.adapter.trigger_vectors
    earlier = _earlier_embedding(run, base.family)
    if earlier and earlier.vectors != vectors:
        raise ConfigError(
            f"adapter.trigger_vectors is {vectors}, but the embedding beside adapter.start_from "
            f"has {earlier.vectors}. Set it to that number."
        )
    text = run.adapter.trigger_init or run.dataset.trigger
    rows = {}
    for part, (tokenizer, encoder) in encoders.items():
        if earlier:
            start = earlier.rows[part].to(encoder.device)
        else:
            start = _rows_of(text, vectors, tokenizer, encoder)
        rows[part] = nn.Parameter(start)
    return Embedding(run.dataset.trigger, rows)


def _earlier_embedding(run: RunConfig, family: ModelFamily) -> Embedding | None:
    """Returns the embedding beside the adapter from which a run continues, if there is one."""
    if not run.adapter.start_from:
        return None
    return next(iter(read_beside([Path(run.adapter.start_from).expanduser()], family)), None)


def _rows_of(text: str, vectors: int, tokenizer: Any, encoder: nn.Module) -> Tensor:
    """Returns the embeddings of a text's tokens, each repeated or skipped to give n vectors."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids or [tokenizer.unk_token_id]
    chosen = [tokens[index * len(tokens) // vectors] for index in range(vectors)]
    ids = torch.tensor(chosen, device=encoder.device)
    rows: Tensor = _table(encoder)(ids)
    return rows.detach().float().clone()


def save_embedding(
    path: Path,
    embedding: Embedding,
    family: ModelFamily,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Writes an embedding in the format of A1111 and ComfyUI, then reads it back and compares it.

    Raises ModelError if the file differs by more than FILE_ERROR_LIMIT, relative to the norm of
    the rows.
    """
    tensors = {}
    for part, key in family.embedding_keys.items():
        tensors[key] = embedding.rows[part].detach().cpu().to(dtype).contiguous()
    architecture = metadata.get("modelspec.architecture", "")
    own = {
        TRIGGER_KEY: embedding.word,
        "modelspec.architecture": architecture.replace("/lora", "/textual-inversion"),
    }
    shared = {key: value for key, value in metadata.items() if not key.startswith("ss_network")}
    atomic_write(path, serialize(tensors, shared | own))

    saved = read_embedding(path, family)
    for part, rows in saved.rows.items():
        trained = embedding.rows[part].detach().cpu().float()
        limit = FILE_ERROR_LIMIT * float(trained.norm())
        if saved.word != embedding.word or not float((rows - trained).norm()) <= limit:
            raise ModelError(
                f"The saved file {path.name} differs from the trained embedding (in its "
                f"{family.embedding_keys[part]})."
            )


def read_embedding(path: Path, family: ModelFamily) -> Embedding:
    """Reads an embedding. If the file contains no word, the word is the name of the file.

    Raises ModelError if the file is damaged or for another kind of base.
    """
    try:
        tensors = load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The embedding {path.name} cannot be read ({str(error)[:100]}). Save it again, or "
            "delete it."
        ) from None
    keys = family.embedding_keys
    shapes = {tuple(tensor.shape[:-1]) for tensor in tensors.values()}
    # Every encoder needs a matrix [vectors, width] with the same number of vectors.
    if set(tensors) != set(keys.values()) or len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ModelError(
            f"The embedding {path.name} is not one for {family.name}: it should contain "
            f"{' and '.join(keys.values())} with the shape [vectors, width]."
        )
    word = read_header(path).metadata.get(TRIGGER_KEY) or path.stem
    return Embedding(word, {part: tensors[key].float() for part, key in keys.items()})


def read_beside(adapters: Iterable[Path], family: ModelFamily) -> list[Embedding]:
    """Returns the embeddings in the files beside these adapter files."""
    paths = [embedding_path(path) for path in adapters]
    return [read_embedding(path, family) for path in paths if path.is_file()]
