"""A trigger with trained embeddings. Nothing else in the text encoders' vocabulary changes."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import TEXT_WIDTH
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
def bases(tiny_base, base_of):
    return {"sd1": tiny_base, "sdxl": base_of("sdxl")}


def tables(pipe):
    """Returns copies of the original embedding tables of the text encoders."""
    copies = []
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if encoder:
            modules = encoder.modules()
            copies += [m.weight.clone() for m in modules if isinstance(m, torch.nn.Embedding)]
    return copies


def are_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(params=KEYS)
def pivotal_run(request, bases, tiny_run):
    """Returns the kind of a base and a run with two trigger vectors on it."""
    return request.param, tiny_run(PIVOTAL | {"base.model": str(bases[request.param])})


def test_the_trigger_vectors_are_counted_as_parameters(pivotal_run):
    kind, run = pivotal_run
    folder = run_folder.create(run)
    session = prepare(run, folder, EventLog(folder / "events.jsonl"))
    counted = sum(p.numel() for p in session.optimisation.parameters.values())
    without = estimate.trainable_parameters(config.replace(run, {"adapter.trigger_vectors": 0}))
    assert counted == estimate.trainable_parameters(run)
    assert counted == without + 2 * TEXT_WIDTH * len(KEYS[kind])


def test_a_run_trains_the_trigger_vectors_and_saves_them_with_each_adapter(pivotal_run):
    kind, run = pivotal_run
    base = load_base(run.base, torch.float32)
    start = textual_inversion.new_trigger_embedding(run, base)
    folder = run_folder.create(run)
    assert run_in(folder) == 0, run_status.read_status(folder).message
    saved = load_file(folder / "tiny-embedding.safetensors")
    assert set(saved) == KEYS[kind]
    assert {tensor.shape for tensor in saved.values()} == {(2, TEXT_WIDTH)}
    path = folder / "tiny-embedding.safetensors"
    trained = textual_inversion.read_embedding(path, base.family)
    assert trained.word == "maya"
    for part, rows in start.rows.items():
        assert not torch.allclose(trained.rows[part], rows)
    names = {path.name for path in folder.glob("*-embedding.safetensors")}
    assert names == {f"tiny{step}-embedding.safetensors" for step in ("", "-000002", "-000004")}


@pytest.mark.parametrize("kind", KEYS)
def test_embeddings_change_only_prompts_with_their_word_and_can_be_removed(kind, bases):
    plain = load_base(Base(model=str(bases[kind])), torch.float32)
    before = tables(plain.pipe)
    prompts = ("maya", "a mayan cat")
    original = {prompt: plain.encode([prompt])["prompt_embeds"] for prompt in prompts}
    parts = plain.family.trainable_text_encoders(plain.pipe)
    rows = {part: torch.randn(2, TEXT_WIDTH) for part in parts}
    extended = textual_inversion.with_embeddings(plain, [Embedding("maya", rows)])
    assert extended.reading.words == (("maya", 2),)
    assert are_equal(tables(extended.pipe), before)
    for prompt in prompts:
        is_same = torch.equal(extended.encode([prompt])["prompt_embeds"], original[prompt])
        assert is_same == (prompt != "maya")
    removed = textual_inversion.with_embeddings(extended, [])
    assert removed == plain and are_equal(tables(removed.pipe), before)
    for prompt in prompts:
        assert torch.equal(removed.encode([prompt])["prompt_embeds"], original[prompt])


def test_the_trigger_starts_as_the_words_of_trigger_init(tiny_run, tiny_base):
    base = load_base(Base(model=str(tiny_base)), torch.float32)
    run = tiny_run(PIVOTAL | {"adapter.trigger_vectors": 3, "adapter.trigger_init": "dog"})
    ids = base.pipe.tokenizer("dog", add_special_tokens=False).input_ids
    table = base.pipe.text_encoder.get_input_embeddings().weight
    start = textual_inversion.new_trigger_embedding(run, base)
    assert len(ids) == 3 and torch.equal(start.rows["text_encoder"], table[ids])
    extended = textual_inversion.with_embeddings(base, [start])
    expected = base.encode(["a dog here"])["prompt_embeds"]
    assert torch.equal(extended.encode(["a MAYA here"])["prompt_embeds"], expected)


def test_the_pooled_output_is_taken_at_the_end_of_the_prompt(tiny_base):
    """CLIP's published configurations contain a wrong id of the end token.

    With it the encoder takes the pooled output at the token with the highest id.
    """
    base = load_base(Base(model=str(tiny_base)), torch.float32)
    encoder, tokenizer = base.pipe.text_encoder, base.pipe.tokenizer
    encoder.eos_token_id = textual_inversion.LEGACY_EOS_ID

    def tokens_of(prompt):
        options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        return tokenizer([prompt], **options).input_ids

    tokens = tokens_of("a cat")
    plain = encoder(tokens).pooler_output
    rows = encoder.get_input_embeddings()(tokens[0, 2:5]).detach()
    embedding = Embedding("maya", {"text_encoder": rows})
    extended = textual_inversion.with_embeddings(base, [embedding])
    (prompt,) = extended.reading.with_placeholders(["a maya"])
    assert int(tokens_of(prompt).max()) > tokenizer.eos_token_id
    assert torch.equal(encoder(tokens_of(prompt)).pooler_output, plain)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_base, tiny_dataset):
    """Returns the folder of a finished run that trained no text encoder except the trigger."""
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


def test_diffusers_loads_the_embedding(learned, tiny_base):
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
    extended = textual_inversion.with_embeddings(
        base, textual_inversion.read_beside([learned / "tiny.safetensors"], base.family)
    )
    assert torch.allclose(extended.encode(["maya, at night"])["prompt_embeds"], theirs, atol=1e-6)


def test_a_save_whose_embedding_was_deleted_is_not_chosen_as_the_best(tiny_run, monkeypatch):
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


def test_a_sample_uses_the_embedding_beside_the_adapter(learned, tiny_base, tmp_path):
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


def test_the_page_offers_the_embedding_and_a_run_continues_from_it(learned, tiny_run):
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


def test_resume_after_an_interruption_gives_an_identical_embedding(learned, tmp_path, monkeypatch):
    again = shutil.copytree(learned, tmp_path / "runs" / "again")
    shutil.rmtree(again / "state" / "000004")
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path))
    assert run_in(again) == 0, run_status.read_status(again).message
    for name in ("tiny.safetensors", "tiny-embedding.safetensors"):
        ours, theirs = load_file(again / name), load_file(learned / name)
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        )


def test_an_embedding_that_does_not_fit_the_base_is_refused(learned, bases, tmp_path):
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


def test_trigger_vectors_are_refused_if_no_clip_encoder_reads_captions(
    bases, tiny_run, monkeypatch
):
    """As in a family that has only T5."""
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
def test_contradicting_trigger_settings_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config.replace(config.RunConfig(), changes)
