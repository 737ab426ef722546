"""The trigger word learned as vectors of its own beside the adapter; nothing else of the text encoders' vocabulary changes."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import TEXT_WIDTH, save_tiny_base
from trainer import config
from trainer.config import Base
from trainer.errors import ConfigError, ModelError
from trainer.families import load_base
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter
from trainer.lora import textual_inversion
from trainer.lora.textual_inversion import Embedding
from trainer.runs import run_folder, run_status
from trainer.runs.events import AdapterSaved, EventLog
from trainer.training import estimate
from trainer.training.runner import run_in
from trainer.training.setup import prepare

PIVOTAL = {
    "dataset.trigger": "maya",
    "dataset.caption_dropout": 0.0,
    "adapter.trigger_vectors": 2,
    "training.trigger_learning_rate": 1e-2,
    "training.steps": 4,
    "saving.precision": "fp32",
    "sampling.prompts": ["Maya, at night"],
}
WORD = {"dataset.trigger": "maya", "adapter.trigger_vectors": 1}
KEYS = {"sd1": {"emb_params"}, "sdxl": {"clip_l", "clip_g"}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_base):
    return {
        "sd1": tiny_base,
        "sdxl": save_tiny_base(tmp_path_factory.mktemp("xl") / "base", kind="sdxl"),
    }


def tables(pipe):
    """The encoders' own tables, to the bit."""
    return [
        m.weight.clone()
        for e in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
        if e
        for m in e.modules()
        if isinstance(m, torch.nn.Embedding)
    ]


@pytest.mark.parametrize("kind", KEYS)
def test_the_word_is_learned_and_every_other_row_stays(kind, bases, tiny_run):
    run = tiny_run(PIVOTAL | {"base.model": str(bases[kind])})
    folder = run_folder.create(run)
    session = prepare(run, folder, EventLog(folder / "events.jsonl"))
    before, start = (
        tables(session.model.base.pipe),
        {part: rows.detach().clone() for part, rows in session.model.trigger.rows.items()},
    )
    plain = load_base(run.base, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, tables(plain.pipe), strict=True))
    count = sum(p.numel() for p in session.optimisation.parameters.values())
    assert (
        count
        == estimate.trainable_parameters(run)
        == estimate.trainable_parameters(config.replace(run, {"adapter.trigger_vectors": 0}))
        + 2 * TEXT_WIDTH * len(KEYS[kind])
    )

    assert run_in(folder) == 0, run_status.read_status(folder).message
    saved = load_file(folder / "tiny-embedding.safetensors")
    assert set(saved) == KEYS[kind] and all(
        tensor.shape == (2, TEXT_WIDTH) for tensor in saved.values()
    )
    learned = textual_inversion.read_embedding(
        folder / "tiny-embedding.safetensors", session.model.base.family
    )
    assert learned.word == "maya" and all(
        not torch.allclose(learned.rows[part], rows) for part, rows in start.items()
    )
    assert {path.name for path in folder.glob("*-embedding.safetensors")} == {
        f"tiny{s}-embedding.safetensors" for s in ("", "-000002", "-000004")
    }
    worn = textual_inversion.with_embeddings(plain, [learned])
    assert worn.reading.words == (("maya", 2),) and all(
        torch.equal(a, b) for a, b in zip(before, tables(worn.pipe), strict=True)
    )
    read = {prompt: worn.encode([prompt])["prompt_embeds"] for prompt in ("maya", "a mayan cat")}
    bare = textual_inversion.with_embeddings(worn, [])
    assert bare == plain and all(
        torch.equal(rows, bare.encode([prompt])["prompt_embeds"]) == (prompt != "maya")
        for prompt, rows in read.items()
    )


def test_it_starts_as_the_words_it_is_said_to(tiny_run, tiny_base):
    base = load_base(Base(model=str(tiny_base)), torch.float32)
    run = tiny_run(PIVOTAL | {"adapter.trigger_vectors": 3, "adapter.trigger_init": "dog"})
    ids, table = (
        base.pipe.tokenizer("dog", add_special_tokens=False).input_ids,
        base.pipe.text_encoder.get_input_embeddings().weight,
    )
    assert len(ids) == 3 and torch.equal(
        textual_inversion.new_trigger_embedding(run, base).rows["text_encoder"], table[ids]
    )
    worn = textual_inversion.with_embeddings(
        base, [textual_inversion.new_trigger_embedding(run, base)]
    )
    as_dog = base.encode(["a dog here"])["prompt_embeds"]
    assert torch.equal(worn.encode(["a MAYA here"])["prompt_embeds"], as_dog)


def test_the_summary_of_a_prompt_is_taken_at_its_end(tiny_base):
    """CLIP's published configurations give a wrong end mark, which stands for: the token with the highest id."""
    base = load_base(Base(model=str(tiny_base)), torch.float32)
    base.pipe.text_encoder.eos_token_id = textual_inversion.LEGACY_EOS_ID
    tokens = base.pipe.tokenizer(
        ["a cat"], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    plain = base.pipe.text_encoder(tokens).pooler_output
    rows = base.pipe.text_encoder.get_input_embeddings()(tokens[0, 2:5]).detach()
    textual_inversion.with_embeddings(base, [Embedding("maya", {"text_encoder": rows})])
    spelled = textual_inversion.with_embeddings(
        base, [Embedding("maya", {"text_encoder": rows})]
    ).reading.with_placeholders(["a maya"])
    again = base.pipe.tokenizer(
        spelled, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    assert int(again.max()) > base.pipe.tokenizer.eos_token_id and torch.equal(
        base.pipe.text_encoder(again).pooler_output, plain
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_base, tiny_dataset):
    """A finished run, its text encoder frozen but for the word."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ATELIER_OUTPUTS", str(tmp_path_factory.mktemp("learned")))
    small = {
        "name": "tiny",
        "base.model": str(tiny_base),
        "dataset.folder": str(tiny_dataset),
        "dataset.resolution": 16,
        "dataset.bucket_step": 8,
    }
    quick = {
        "adapter.rank": 2,
        "adapter.alpha": 4.0,
        "training.learning_rate": 1e-2,
        "training.warmup": 0.0,
        "saving.saves": 1,
        "saving.state_every": 2,
        "sampling.inference_steps": 2,
    }
    folder = run_folder.create(config.replace(config.RunConfig(), PIVOTAL | small | quick))
    assert run_in(folder) == 0, run_status.read_status(folder).message
    yield folder
    patch.undo()


def test_diffusers_reads_the_file(learned, tiny_base):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_textual_inversion(learned, weight_name="tiny-embedding.safetensors", token="<maya>")
    ids = pipe.tokenizer.convert_tokens_to_ids(["<maya>", "<maya>_1"])
    assert torch.equal(
        pipe.text_encoder.get_input_embeddings().weight[ids],
        load_file(learned / "tiny-embedding.safetensors")["emb_params"],
    )
    theirs = pipe.encode_prompt("<maya>, at night", "cpu", 1, False)[0]
    base = load_base(Base(model=str(tiny_base)), torch.float32)
    worn = textual_inversion.with_embeddings(
        base, textual_inversion.read_beside([learned / "tiny.safetensors"], base.family)
    )
    assert torch.allclose(worn.encode(["maya, at night"])["prompt_embeds"], theirs, atol=1e-6)


def test_an_embedding_that_was_taken_away_meanwhile_costs_its_save_alone(tiny_run, monkeypatch):
    folder = run_folder.create(tiny_run(PIVOTAL))
    append = EventLog.append

    def take_away(self, event):
        append(self, event)
        if isinstance(event, AdapterSaved) and event.step == 4:
            (folder / "tiny-000002-embedding.safetensors").unlink()

    monkeypatch.setattr(EventLog, "append", take_away)
    monkeypatch.setattr(run_status.RunStatus, "best_step", 2)
    assert run_in(folder) == 0 and run_status.read_status(folder).file_step == 4
    finished, last = (
        load_file(folder / f"tiny{name}-embedding.safetensors") for name in ("", "-000004")
    )
    assert torch.equal(finished["emb_params"], last["emb_params"])


def test_the_preview_reads_it_where_it_lies_beside(learned, tiny_base, tmp_path):
    sampler, status = Sampler(), run_status.read_status(learned)
    alone = shutil.copy(learned / "tiny.safetensors", tmp_path / "alone.safetensors")

    def draw(file, prompt="Maya, at night", strength=1.0):
        settings = {
            "base": Base(model=str(tiny_base)),
            "inference_steps": 2,
            "width": 16,
            "height": 16,
            "seed": status.samples[-1].seed,
        }
        adapters = [StackedAdapter(str(file), strength)] if file else []
        return Image.open(
            sampler.render(
                SampleRequest(
                    prompt=prompt, target=str(tmp_path / "drawn.png"), adapters=adapters, **settings
                )
            )
        ).tobytes()

    base, shown = draw(None), Image.open(learned / status.samples[-1].file).tobytes()
    beside = draw(learned / "tiny.safetensors")
    assert max(abs(a - b) for a, b in zip(shown, beside, strict=True)) <= 1, "the sample of the run"
    assert beside != draw(alone) and beside == draw(learned / "tiny-000004.safetensors")
    assert draw(learned / "tiny.safetensors", "at night") == draw(alone, "at night")
    assert draw(learned / "tiny.safetensors", strength=0.0) == base == draw(None)


def test_the_page_hands_it_out_and_a_run_goes_on_from_it(learned, tiny_run):
    from app.views import files

    file = files.adapter_file(learned, run_status.read_status(learned))
    assert file["embedding"]["name"] == "tiny-embedding.safetensors"
    on = {"adapter.start_from": str(learned / "tiny.safetensors"), "training.steps": 1}
    run = tiny_run(PIVOTAL | on)
    base = load_base(run.base, torch.float32)
    saved = load_file(learned / "tiny-embedding.safetensors")["emb_params"]
    assert torch.equal(
        textual_inversion.new_trigger_embedding(run, base).rows["text_encoder"], saved
    )
    with pytest.raises(ConfigError, match="has 2"):
        textual_inversion.new_trigger_embedding(
            config.replace(run, {"adapter.trigger_vectors": 3}), base
        )


def test_an_interrupted_run_goes_on_to_the_same_word(learned, tmp_path, monkeypatch):
    again = shutil.copytree(learned, tmp_path / "runs" / "again")
    shutil.rmtree(again / "state" / "000004")
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path))
    assert run_in(again) == 0, run_status.read_status(again).message
    for name in ("tiny.safetensors", "tiny-embedding.safetensors"):
        ours, theirs = load_file(again / name), load_file(learned / name)
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        )


def test_a_file_that_does_not_fit_is_refused_in_a_sentence(learned, bases, tmp_path):
    sdxl = load_base(Base(model=str(bases["sdxl"])), torch.float32)
    with pytest.raises(ModelError, match="should contain clip_l and clip_g"):
        textual_inversion.read_embedding(learned / "tiny-embedding.safetensors", sdxl.family)
    with pytest.raises(ModelError, match="another kind of base"):
        textual_inversion.with_embeddings(
            sdxl,
            [
                Embedding(
                    "maya",
                    {
                        "text_encoder": torch.zeros(1, TEXT_WIDTH),
                        "text_encoder_2": torch.zeros(1, 9),
                    },
                )
            ],
        )
    (tmp_path / "x-embedding.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read"):
        textual_inversion.read_beside([tmp_path / "x-diffusers.safetensors"], sdxl.family)


def test_vectors_that_no_encoder_reads_are_refused(bases, tiny_run, monkeypatch):
    """As of a family that has T5 alone."""
    base = load_base(Base(model=str(bases["sdxl"])), torch.float32)
    monkeypatch.setattr(type(base.family), "trainable_text_encoders", lambda self, pipe: {})
    with pytest.raises(
        ConfigError, match="no CLIP text encoder reads the captions of Stable Diffusion XL"
    ):
        textual_inversion.new_trigger_embedding(tiny_run(WORD), base)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"adapter.trigger_vectors": 1}, "Set dataset.trigger"),
        ({"adapter.trigger_vectors": 1, "dataset.trigger": " "}, "Set dataset.trigger"),
        ({"adapter.trigger_init": "dog"}, "is the start of adapter.trigger_vectors"),
        (WORD | {"training.trigger_learning_rate": 0.0}, "learns nothing"),
        (
            WORD | {"training.optimizer": "prodigy", "training.learning_rate": 1.0},
            "trigger_learning_rate",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config.replace(config.RunConfig(), changes)
