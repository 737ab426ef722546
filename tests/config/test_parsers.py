"""Lists that are written as text."""

import pytest

from trainer.config import parsers


def test_arguments_of_an_optimizer_are_python_literals():
    lines = ("betas=(0.9, 0.99)", "eps = 1e-6", "amsgrad=True", "mode='max'")
    assert parsers.optimizer_arguments(lines) == {
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "amsgrad": True,
        "mode": "max",
    }


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["betas"], "not of the form name=value"),
        (["2x=1"], "not of the form name=value"),
        (["eps=1", "eps=2"], "eps is given twice"),
        (["lr=1"], "lr is not an argument here"),
        (["eps=__import__('os')"], "the value of eps is not a number"),
        (["eps=" + "(" * 2000], "the value of eps is not a number"),
    ],
)
def test_other_arguments_of_an_optimizer_are_refused(lines, words):
    with pytest.raises(ValueError, match=words):
        parsers.optimizer_arguments(lines)


def test_repeats_are_read_by_folder():
    lines = ["closeups = 3", "a/b/=10", ". = 2", "a=b=4"]
    assert parsers.folder_repeats(lines) == {"closeups": 3, "a/b": 10, ".": 2, "a=b": 4}


@pytest.mark.parametrize("line", ["closeups", "= 3", "closeups = 0", "closeups = 1000", "x = 1.5"])
def test_other_repeats_are_refused(line):
    with pytest.raises(ValueError, match="not of the form folder = number"):
        parsers.folder_repeats([line])


def test_numbers_are_read_by_the_name_of_a_block():
    text = "mid_block=32, attn2 = 8.5,,up_blocks.0=4096"
    assert parsers.numbers_by_name(text) == {"mid_block": 32, "attn2": 8.5, "up_blocks.0": 4096}
    assert parsers.numbers_by_name("") == {}


@pytest.mark.parametrize("text", ["mid_block", "mid_block:3", "a=-1", "a=4097", "1a=2", "a=b"])
def test_other_numbers_are_refused(text):
    with pytest.raises(ValueError, match="such as mid_block=32, attn2=8"):
        parsers.numbers_by_name(text)


@pytest.mark.parametrize(
    ("check", "good", "bad", "words"),
    [
        (parsers.checked_ranks, "a=0, b=512", "a=1.5", "whole numbers up to 512"),
        (parsers.checked_ranks, "", "a=513", "whole numbers up to 512"),
        (parsers.checked_alphas, "a=0.5", "a=1, b=0", "an alpha is above 0"),
        (parsers.checked_pattern, r"attn\d", "(", "not a valid regular expression"),
    ],
)
def test_a_check_returns_its_text_or_refuses_it(check, good, bad, words):
    assert check(good) == good
    with pytest.raises(ValueError, match=words):
        check(bad)
