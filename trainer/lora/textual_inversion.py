"""Words that the CLIP text encoders did not have: a trigger with vectors of its own, learned beside the adapter, and its file.

Textual inversion (Gal et al. 2022, arXiv:2208.01618) together with an adapter is known as pivotal tuning, after Roich et al. 2021
(arXiv:2106.05744). The encoder's own table is never written to: the new rows stand behind it.
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

LEGACY_END = 2  # what CLIP's configurations once gave as the id of the end mark; the encoder then looks for the highest id instead
TRIGGER = "modelspec.trigger_phrase"


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors, [n, width] float32 for each text encoder: {"text_encoder": ..., "text_encoder_2": ...}."""

    word: str
    rows: Mapping[str, Tensor]

    @property
    def vectors(self) -> int:
        return len(next(iter(self.rows.values())))


class WiderTable(nn.Module):
    """An encoder's table of tokens with learned rows for the ids from `first` on."""

    def __init__(self, table: nn.Embedding, words: list[tuple[int, Tensor]]):
        super().__init__()
        self.table = table
        self.words = words  # in a list, so that they are not taken for parameters of the encoder, or of its adapter

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds = self.table(input_ids.clamp(max=self.table.num_embeddings - 1))
        for first, rows in self.words:
            place = input_ids - first
            learned = F.embedding(place.clamp(0, len(rows) - 1), rows).to(embeds.dtype)
            embeds = torch.where(((place >= 0) & (place < len(rows)))[..., None], learned, embeds)
        return embeds


def put_on(base: LoadedBase, embeddings: Sequence[Embedding]) -> LoadedBase:
    """The base that reads these words with these rows, and no others; they get gradients where they want them.

    Raises ModelError, and leaves the base as it was, where an embedding does not fit.
    """
    by_word = {
        embedding.word: embedding for embedding in embeddings
    }  # of two for a word the later one
    readers = _readers(base)
    for embedding in by_word.values():
        for part, (_, encoder) in readers.items():
            if (
                part not in embedding.rows
                or embedding.rows[part].shape[1] != _table(encoder).embedding_dim
            ):
                raise ModelError(
                    f"The embedding of {embedding.word} does not fit {base.files.path.name}: it is for another kind of base."
                )
    for part, (tokenizer, encoder) in readers.items():
        words = []
        for word, embedding in by_word.items():
            tokens = placeholders(word, embedding.vectors)
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
            words.append(
                (
                    tokenizer.convert_tokens_to_ids(tokens[0]),
                    embedding.rows[part].to(encoder.device),
                )
            )
        encoder.set_input_embeddings(
            WiderTable(_table(encoder), words) if words else _table(encoder)
        )
        for module in encoder.modules():
            if (
                getattr(module, "eos_token_id", None) == LEGACY_END
            ):  # the pooled output would be taken at the new word
                module.eos_token_id = tokenizer.eos_token_id
    return replace(
        base,
        reading=replace(
            base.reading, words=tuple((word, e.vectors) for word, e in by_word.items())
        ),
    )


def _table(encoder: nn.Module) -> nn.Embedding:
    table = encoder.get_input_embeddings()
    return table.table if isinstance(table, WiderTable) else table


def _readers(base: LoadedBase) -> dict[str, tuple[Any, nn.Module]]:
    """Tokenizer and encoder by the encoder's name in the pipeline; those of CLIP."""
    encoders = base.family.trainable_text_encoders(base.pipe)
    return {
        part: (getattr(base.pipe, part.replace("text_encoder", "tokenizer")), encoder)
        for part, encoder in encoders.items()
    }


def fresh(run: RunConfig, base: LoadedBase) -> Embedding:
    """As the settings have it begin: the tokens of the words it starts as, spread over its vectors, or the embedding of the adapter that
    the run goes on from. Raises ConfigError where that has another number of vectors, or nothing reads them."""
    if not _readers(base):
        raise ConfigError(
            f"adapter.trigger_vectors: no CLIP text encoder reads the captions of {base.family.name}; set it to 0."
        )
    start, vectors, rows = (
        run.adapter.trigger_init or run.dataset.trigger,
        run.adapter.trigger_vectors,
        {},
    )
    earlier = read_beside(
        [Path(run.adapter.start_from).expanduser()] if run.adapter.start_from else [], base.family
    )
    if earlier and earlier[0].vectors != vectors:
        raise ConfigError(
            f"adapter.trigger_vectors is {vectors}, but the embedding beside adapter.start_from has {earlier[0].vectors}; set it to that."
        )
    for part, (tokenizer, encoder) in _readers(base).items():
        tokens = tokenizer(start, add_special_tokens=False).input_ids or [tokenizer.unk_token_id]
        chosen = torch.tensor(
            [tokens[i * len(tokens) // vectors] for i in range(vectors)], device=encoder.device
        )
        begin = (
            earlier[0].rows[part].to(encoder.device)
            if earlier
            else _table(encoder)(chosen).detach().float().clone()
        )
        rows[part] = nn.Parameter(begin)
    return Embedding(run.dataset.trigger, rows)


# Files


def save_embedding(
    path: Path,
    embedding: Embedding,
    family: ModelFamily,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """The form of A1111 and ComfyUI, read back and compared. Raises ModelError where the file is not what was learned."""
    tensors = {
        key: embedding.rows[part].detach().cpu().to(dtype).contiguous()
        for part, key in family.embedding_keys.items()
    }
    told = {key: value for key, value in metadata.items() if not key.startswith("ss_network")}
    architecture = told.get("modelspec.architecture", "").replace("/lora", "/textual-inversion")
    atomic_write(
        path,
        serialize(
            tensors, told | {TRIGGER: embedding.word, "modelspec.architecture": architecture}
        ),
    )
    found = read_embedding(path, family)
    for part, rows in found.rows.items():
        learned = embedding.rows[part].detach().cpu().float()
        if found.word != embedding.word or not float(
            (rows - learned).norm()
        ) <= FILE_ERROR_LIMIT * float(learned.norm()):
            raise ModelError(
                f"The saved file {path.name} is not what was learned (in its {family.embedding_keys[part]})."
            )


def read_embedding(path: Path, family: ModelFamily) -> Embedding:
    """Raises ModelError for what is damaged or made for another kind of base. A file that names no word is called by its own name."""
    try:
        tensors = load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The embedding {path.name} cannot be read ({str(error)[:100]}). Save it anew, or take it away."
        ) from None
    keys = family.embedding_keys
    if (
        set(tensors) != set(keys.values())
        or len({tuple(t.shape[:-1]) for t in tensors.values()}) != 1
        or next(iter(tensors.values())).dim() != 2
    ):
        raise ModelError(
            f"The embedding {path.name} is not one for {family.name}: it should hold {' and '.join(keys.values())}, [vectors, width]."
        )
    return Embedding(
        read_header(path).metadata.get(TRIGGER) or path.stem,
        {part: tensors[key].float() for part, key in keys.items()},
    )


def read_beside(adapters: Iterable[Path], family: ModelFamily) -> list[Embedding]:
    """Those that lie beside adapter files."""
    return [read_embedding(path, family) for path in map(embedding_path, adapters) if path.is_file()]
