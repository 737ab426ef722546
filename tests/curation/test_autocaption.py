"""Models caption a dataset: real classes with random weights, small enough to be made on the spot."""

import csv
import sys

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
    """A BLIP of two thin layers, saved as the published one is."""
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
    """A Florence-2 of two thin stages, saved as the published one is."""
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
    images.image_seq_length = 17  # 4 x 4 places and their mean
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
    with torch.no_grad():  # it should say words rather than end at once
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
    """An ONNX model whose scores are constants, plus how red the picture is for "sea"."""
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


def test_sentences_go_to_pictures_without_a_caption_and_can_be_taken_back(blip, dataset):
    said = []
    assert caption_dataset(dataset, CaptionRequest(model=str(blip), prefix="maya"), said.append) == 2
    written = captions(dataset)
    assert written["1"] == "mine" and written["0"].startswith("maya, ")
    assert set(written["0"].removeprefix("maya, ").split()) <= set(WORDS)
    kinds = [type(event) for event in events(dataset)]
    assert kinds.count(Captioned) == 2 and kinds[-1] is CaptionsDone and Progress in kinds
    assert events(dataset)[-1].written == 2 and events(dataset)[-1].kept == 1
    history.undo(dataset)
    assert captions(dataset) == {"1": "mine"} and history.last(dataset) is None


def test_florence_is_asked_its_own_way(florence, dataset):
    assert caption_dataset(dataset, CaptionRequest(model=str(florence), overwrite=True)) == 3
    written = captions(dataset)
    assert all(text and set(text.split()) <= set(WORDS) for text in written.values()), written


def test_tags_keep_their_thresholds(tagger, dataset):
    caption_dataset(dataset, CaptionRequest(tagger=str(tagger), overwrite=True))
    assert captions(dataset).keys() == {"0", "1", "2"} and "blue sky, " in captions(dataset)["1"]
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    describe = autocaption.load_tagger(tagger, CaptionRequest())
    assert describe(red) == "sea, blue sky, red hat, ^_^"
    assert describe(Image.new("RGB", (40, 40), (0, 0, 255))) == "blue sky, red hat, ^_^"
    picky = CaptionRequest(threshold=0.5, character_threshold=0.7, blacklist=("Red_Hat",))
    assert autocaption.load_tagger(tagger, picky)(Image.new("RGB", (8, 8))) == "blue sky, maya"


def test_both_make_one_caption(blip, tagger, dataset):
    caption_dataset(dataset, CaptionRequest(str(blip), str(tagger)))
    sentence, _, tags = captions(dataset)["0"].partition(", ")
    assert sentence.split()[0] in WORDS and "blue sky" in tags


def test_the_command_is_the_job_and_stops_when_asked(tagger, dataset, monkeypatch, capsys):
    assert (
        main(
            [
                "caption",
                str(dataset),
                "--tagger",
                str(tagger),
                "--overwrite",
                "--blacklist",
                "sea, ^_^",
            ]
        )
        == 0
    )
    assert "3 captions written" in capsys.readouterr().out
    assert captions(dataset)["2"] == "blue sky, red hat"
    real = autocaption.describe

    def asked_to_stop(*arguments):
        run_requests.request(autocaption.job_folder(dataset), "stop")
        return real(*arguments)

    monkeypatch.setattr(autocaption, "describe", asked_to_stop)
    assert caption_dataset(dataset, CaptionRequest(tagger=str(tagger), overwrite=True, prefix="new")) == 1
    assert events(dataset)[-1].stopped and captions(dataset)["1"] == "blue sky, red hat"


def test_only_one_job_at_a_time(tagger, dataset):
    folder = autocaption.job_folder(dataset)
    folder.mkdir()
    with run_lock.acquire(folder), pytest.raises(StateError):
        caption_dataset(dataset, CaptionRequest(tagger=str(tagger)))


def test_a_model_that_says_nothing_takes_no_caption_away(blip, dataset, monkeypatch):
    monkeypatch.setattr(autocaption, "load_sentence_model", lambda folder: lambda image: "")
    assert caption_dataset(dataset, CaptionRequest(model=str(blip), overwrite=True)) == 0
    assert (
        captions(dataset) == {"1": "mine"}
        and sum(isinstance(event, Warned) for event in events(dataset)) == 3
    )


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (CaptionRequest(), "No captioning model is given"),
        (CaptionRequest(model="no/such-model"), "cannot be downloaded"),
        (CaptionRequest(model="what is this"), "neither a folder nor"),
        (CaptionRequest(model="EMPTY"), "not a captioning model"),
        (CaptionRequest(tagger="EMPTY"), "not a tagger"),
    ],
)
def test_no_model_is_a_sentence(dataset, tmp_path, wish, says):
    (tmp_path / "EMPTY").mkdir()
    wish = CaptionRequest(
        **{
            name: str(tmp_path / "EMPTY") if value == "EMPTY" else value
            for name, value in vars(wish).items()
        }
    )
    with pytest.raises(ModelError, match=says):
        caption_dataset(dataset, wish)
    assert isinstance(events(dataset)[-1], Failed) and captions(dataset) == {"1": "mine"}


def test_without_onnxruntime_it_says_what_to_install(dataset, tagger, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"pip install .lora-atelier\[tagger\]"):
        autocaption.load_tagger(tagger, CaptionRequest())


def test_what_would_be_downloaded_is_counted(monkeypatch):
    from huggingface_hub import HfApi

    class File:
        def __init__(self, name, size):
            self.rfilename, self.size = name, size

    files = [
        File("model.safetensors", 900),
        File("config.json", 10),
        File("pytorch_model.bin", 900),
        File("onnx/model.onnx", 5),
        File("README.md", 1),
    ]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: type("Info", (), {"siblings": files}))
    assert autocaption.download_bytes("some/model") == 910
    files[:] = [File("pytorch_model.bin", 900), File("config.json", 10)]
    with pytest.raises(ModelError, match="safe format"):
        autocaption.download_bytes("some/model")
