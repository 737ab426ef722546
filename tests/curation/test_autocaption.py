"""Captioning with models: real classes with random weights, small enough to create here."""

import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.corpus import encoded, photo
from trainer.cli.main import main
from trainer.curation import autocaption, history
from trainer.curation.autocaption import CaptionRequest, caption_dataset
from trainer.errors import ModelError, StateError
from trainer.runs import run_lock, run_requests
from trainer.runs.events import Captioned, CaptionsDone, Failed, Progress, Warned, read_events

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "dog",
    "on",
    "red",
    "mat",
    "sits",
]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A BLIP with two thin layers, saved like the published one."""
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    thin = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = thin | {
        "vocab_size": len(WORDS),
        "encoder_hidden_size": 16,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    config = BlipConfig(text_config=text, vision_config=thin | {"image_size": 32, "patch_size": 16})
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(
        BlipImageProcessorPil(size={"height": 32, "width": 32}),
        BertTokenizer(str(folder / "vocab.txt")),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def florence(tmp_path_factory):
    """A Florence-2 with two thin stages, saved like the published one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BartConfig,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("florence")
    words = ["<s>", "<pad>", "</s>", "<unk>", "<image>", *WORDS[5:]]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **special
    )
    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    images.image_seq_length = 17  # 4 x 4 positions and their mean
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    layers = {
        f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in sizes.items()
    }
    text = BartConfig(
        vocab_size=len(words),
        d_model=16,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        **layers,
    )
    vision = {
        "embed_dim": [8, 16],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "num_groups": [1, 2],
        "window_size": 4,
        "projection_dim": 16,
    }
    vision |= {
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
    }
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(
        Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=4)
    )
    with torch.no_grad():  # makes it write words instead of ending at once
        model.get_input_embeddings().weight[5:] *= 50
    model.save_pretrained(folder)
    Florence2Processor(images, fast).save_pretrained(folder)
    return folder


TAGS = [
    ("general", 9),
    ("sensitive", 9),
    ("red_hat", 0),
    ("blue_sky", 0),
    ("^_^", 0),
    ("maya", 4),
    ("sea", 0),
]
SCORES = [0.99, 0.5, 0.6, 0.9, 0.4, 0.8, 0.1]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """An ONNX model with constant scores, except that "sea" depends on how red the image is."""
    onnx = pytest.importorskip("onnx", reason="onnx, which makes the tiny tagger, is not installed")
    from onnx import TensorProto, helper

    folder = tmp_path_factory.mktemp("tagger")
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 16, 16, 3])
    out = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", len(TAGS)])
    pick = np.zeros((3, len(TAGS)), np.float32)
    pick[2, -1] = 1 / 255  # the third channel of BGR
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "pick"], ["redness"]),
        helper.make_node("Add", ["redness", "scores"], ["output"]),
    ]
    weights = [
        helper.make_tensor("pick", TensorProto.FLOAT, pick.shape, pick.ravel()),
        helper.make_tensor("scores", TensorProto.FLOAT, [len(TAGS)], SCORES),
    ]
    graph = helper.make_graph(nodes, "tagger", [picture], [out], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        folder / "model.onnx",
    )
    with open(folder / "selected_tags.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([number, name, kind, 1] for number, (name, kind) in enumerate(TAGS))
    return folder


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(encoded(photo(seed=seed), "PNG"))
    (folder / "1.txt").write_text("mine")
    return folder


def captions(dataset):
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(dataset.glob("*.txt"))}


def events(dataset):
    return list(read_events(autocaption.job_folder(dataset) / "events.jsonl"))


def test_images_without_a_caption_get_a_sentence_and_undo_removes_it(blip, dataset):
    lines = []
    request = CaptionRequest(model=str(blip), prefix="maya")
    assert caption_dataset(dataset, request, lines.append) == 2
    written = captions(dataset)
    assert written["1"] == "mine"
    assert written["0"].startswith("maya, ")
    assert set(written["0"].removeprefix("maya, ").split()) <= set(WORDS)
    assert lines == [f"{stem}.png: {written[stem]}" for stem in "02"]

    log = events(dataset)
    assert sum(isinstance(event, Captioned) for event in log) == 2
    assert any(isinstance(event, Progress) for event in log)
    assert isinstance(log[-1], CaptionsDone)
    assert (log[-1].written, log[-1].kept, log[-1].stopped) == (2, 1, False)

    history.undo(dataset)
    assert captions(dataset) == {"1": "mine"}
    assert history.last(dataset) is None


def test_florence_gets_its_task_prompt(florence, dataset):
    assert caption_dataset(dataset, CaptionRequest(model=str(florence), overwrite=True)) == 3
    written = captions(dataset)
    assert all(text and set(text.split()) <= set(WORDS) for text in written.values()), written


def test_tags_come_from_the_image_in_order_of_their_score(tagger):
    describe = autocaption.load_tagger(tagger, CaptionRequest())
    assert describe(Image.new("RGB", (40, 20), (255, 0, 0))) == "sea, blue sky, red hat, ^_^"
    assert describe(Image.new("RGB", (40, 40), (0, 0, 255))) == "blue sky, red hat, ^_^"


def test_tags_have_thresholds_by_category_and_a_blacklist(tagger):
    request = CaptionRequest(threshold=0.5, character_threshold=0.7, blacklist=("Red_Hat",))
    describe = autocaption.load_tagger(tagger, request)
    assert describe(Image.new("RGB", (8, 8))) == "blue sky, maya"


def test_a_sentence_and_tags_become_one_caption(blip, tagger, dataset):
    caption_dataset(dataset, CaptionRequest(str(blip), str(tagger)))
    sentence, _, tags = captions(dataset)["0"].partition(", ")
    assert sentence.split()[0] in WORDS
    assert "blue sky" in tags


def test_the_command_writes_captions(tagger, dataset, capsys):
    options = ["--tagger", str(tagger), "--overwrite", "--blacklist", "sea, ^_^"]
    assert main(["caption", str(dataset), *options]) == 0
    assert "3 captions written" in capsys.readouterr().out
    assert captions(dataset) == dict.fromkeys("012", "blue sky, red hat")


def test_a_stop_request_ends_the_job_after_the_current_image(tagger, dataset, monkeypatch):
    real = autocaption.describe

    def stop_and_describe(*arguments):
        run_requests.request(autocaption.job_folder(dataset), "stop")
        return real(*arguments)

    monkeypatch.setattr(autocaption, "describe", stop_and_describe)
    request = CaptionRequest(tagger=str(tagger), overwrite=True)
    assert caption_dataset(dataset, request) == 1
    assert events(dataset)[-1].stopped
    assert captions(dataset)["1"] == "mine"


def test_only_one_job_runs_at_a_time(tagger, dataset):
    folder = autocaption.job_folder(dataset)
    folder.mkdir()
    with run_lock.acquire(folder), pytest.raises(StateError):
        caption_dataset(dataset, CaptionRequest(tagger=str(tagger)))


def test_an_empty_result_keeps_the_existing_caption(blip, dataset, monkeypatch):
    monkeypatch.setattr(autocaption, "load_sentence_model", lambda folder: lambda image: "")
    assert caption_dataset(dataset, CaptionRequest(model=str(blip), overwrite=True)) == 0
    assert captions(dataset) == {"1": "mine"}
    assert sum(isinstance(event, Warned) for event in events(dataset)) == 3


@pytest.mark.parametrize(
    ("request_changes", "message"),
    [
        ({}, "No captioning model is given"),
        ({"model": "no/such-model"}, "cannot be downloaded"),
        ({"model": "what is this"}, "neither a folder nor"),
        ({"model": "EMPTY"}, "not a captioning model"),
        ({"tagger": "EMPTY"}, "not a tagger"),
    ],
)
def test_a_model_that_cannot_be_used_is_an_error_message(
    dataset, tmp_path, request_changes, message
):
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    changes = {name: value.replace("EMPTY", str(empty)) for name, value in request_changes.items()}
    with pytest.raises(ModelError, match=message):
        caption_dataset(dataset, CaptionRequest(**changes))
    assert isinstance(events(dataset)[-1], Failed)
    assert captions(dataset) == {"1": "mine"}


def test_without_onnxruntime_the_error_names_the_package(dataset, tagger, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"pip install .lora-atelier\[tagger\]"):
        autocaption.load_tagger(tagger, CaptionRequest())


def test_download_size_counts_only_needed_files(monkeypatch):
    from huggingface_hub import HfApi

    def with_files(sizes):
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
        info = SimpleNamespace(siblings=files)
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)

    with_files(
        {
            "model.safetensors": 900,
            "config.json": 10,
            "pytorch_model.bin": 900,
            "onnx/model.onnx": 5,
            "README.md": 1,
        }
    )
    assert autocaption.download_bytes("some/model") == 910
    with_files({"model.onnx": 300, "selected_tags.csv": 20, "model.safetensors": 900})
    assert autocaption.download_bytes("some/model") == 320
    with_files({"pytorch_model.bin": 900, "config.json": 10})
    with pytest.raises(ModelError, match="safe format"):
        autocaption.download_bytes("some/model")
