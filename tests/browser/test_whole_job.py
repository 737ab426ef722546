"""The whole job with the real page, trainer and embedded base: images in, adapter out."""

import io
import logging
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from app.actions import datasets
from tests.browser.conftest import PATIENCE, open_dataset
from trainer.config import presets
from trainer.models import model_files
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import run_folder

EXAMPLE = datasets.EXAMPLES / "subject"
# No other test uses this prompt, so it shows that the page has selected this run.
PROMPT = "a zorbit on a blue background"

pytestmark = [
    pytest.mark.skipif(
        not (EMBEDDED_FOLDER / "model_index.json").is_file(),
        reason="the embedded base is not there",
    ),
    pytest.mark.timeout(1200),  # a minute on an idle machine
]


def test_pictures_in_adapter_out(open_page, server, tmp_path: Path) -> None:
    page = open_page()
    drop_pictures(page)
    edit_a_caption(page, server)
    start_training(page)
    page.close()

    page = open_page("train")
    see_it_run(page)
    folder = wait_until_finished(page, server)
    preview = compare_at_strength(page, server)
    file = download(page, tmp_path)

    assert file.read_bytes() == (folder / file.name).read_bytes()
    assert_loads_and_draws(file, preview)


def drop_pictures(page) -> None:
    pictures = [
        path for path in sorted(EXAMPLE.iterdir()) if path.suffix in (".png", ".jpg", ".webp")
    ]
    assert len(pictures) == 12
    open_dataset(page, "zorbit")
    page.set_input_files(
        "#dataset-files", [*pictures, *[picture.with_suffix(".txt") for picture in pictures]]
    )
    page.wait_for_function("document.querySelectorAll('.at-card').length === 12")
    assert page.locator(".at-summary").inner_text().startswith("12 images")


def edit_a_caption(page, server) -> None:
    caption = page.locator(".at-card textarea").first
    caption.fill("a zorbit on a plain background")
    caption.press("Control+Enter")
    page.wait_for_selector(".at-saved:text-is('saved')")
    texts = [
        path.read_text().strip() for path in (server.outputs / "datasets" / "zorbit").glob("*.txt")
    ]
    assert "a zorbit on a plain background" in texts
    assert page.evaluate(
        "document.activeElement === document.querySelectorAll('.at-card textarea')[1]"
    )


def start_training(page) -> None:
    page.get_by_role("button", name="Go to training").first.click()
    page.wait_for_selector("#start-training", state="visible")
    page.wait_for_function(
        "document.querySelector('#field-dataset-trigger textarea, #field-dataset-trigger input')"
        ".value === 'zorbit'"
    )
    choose_recipe(page)
    page.locator("#field-sampling-prompts textarea").fill(PROMPT)
    page.locator("#advanced > button").click()
    set_number(page, "training", "steps", 16)
    set_number(page, "sampling", "inference_steps", 6)
    set_number(page, "saving", "saves", 2)
    page.wait_for_function("document.querySelector('#estimate').innerText.includes('= 16 steps')")
    page.locator("#start-training").click()
    page.wait_for_selector("#progress .at-panel")


def choose_recipe(page) -> None:
    """Selects another purpose and then this one: when the estimate follows, the form is filled."""
    line = "document.querySelector('#estimate').innerText"
    page.wait_for_function(f"{line}.includes(' steps in ')")
    own = page.evaluate(line)
    page.locator("#field-preset input[value=embedded-style]").check()
    page.wait_for_function(f"(own) => {line}.includes(' steps in ') && {line} !== own", arg=own)
    page.locator("#field-preset input[value=embedded-object]").check()
    page.wait_for_function(f"(own) => {line} === own", arg=own)


def set_number(page, section: str, name: str, value: int) -> None:
    """Waits for the field and its number: Gradio draws a section when it opens, then fills it."""
    page.locator(f"#section-{section} > button").click()
    field = f"#field-{section}-{name} input"
    page.wait_for_function(f"document.querySelector('{field}')?.value")
    page.locator(field).first.fill(str(value))
    page.wait_for_function(
        "[...document.querySelectorAll('.at-changed button')]"
        f".some(chip => / {value} ↺$/.test(chip.innerText))"
    )


def see_it_run(page) -> None:
    page.wait_for_function(
        "/Starting|Loading|Reading|Drawing|Training/.test(document.querySelector('#state-pill').innerText)"
    )
    page.wait_for_selector("#progress .at-bar")


def wait_until_finished(page, server) -> Path:
    page.wait_for_function(
        "['Finished', 'Failed'].includes(document.querySelector('#progress .at-pill')?.innerText)",
        timeout=2 * PATIENCE * 1000,
    )
    assert page.locator("#progress .at-pill").inner_text() == "Finished", page.locator(
        "#progress"
    ).inner_text()
    assert page.locator("#progress .at-figures").inner_text().startswith("16 / 16")
    captions = page.locator("#samples .at-samples").first.locator("figcaption").all_inner_texts()
    assert (
        captions[0] == "Base"
        and len(captions) == 3
        and sum("★" in caption for caption in captions) == 1
    )
    assert page.locator("#curve svg polyline").count() >= 2
    return next(
        folder
        for folder in run_folder.list_runs(server.outputs / "runs")
        if "zorbit" in folder.name
    )


def compare_at_strength(page, server) -> Image.Image:
    """Moves the slider by keyboard and gives the picture with the adapter."""
    page.locator("#progress").get_by_role("button", name="Preview").click()
    page.wait_for_function(
        f"document.querySelector('#preview-prompt textarea')?.value === '{PROMPT}'"
    )
    page.wait_for_function(
        "document.querySelector('#preview-save input').value.startsWith('Finished file')"
    )
    page.locator("#preview-strength input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("""() => { const view = document.querySelector('#preview-view');
        return view.innerText.includes('strength 1.1')
            && view.querySelectorAll('img').length === 2 && !view.querySelector('.at-busy') }""")
    sources = page.locator("#preview-view img").evaluate_all(
        "images => images.map(image => image.getAttribute('src'))"
    )
    base, adapted = (
        Image.open(io.BytesIO(page.request.get(server.url + source).body())).convert("RGB")
        for source in sources
    )
    assert ImageChops.difference(base, adapted).getbbox() is not None
    return adapted


def download(page, tmp_path: Path) -> Path:
    page.get_by_role("tab", name="Library").click()
    with page.expect_download() as waiting:
        page.locator("article[aria-label=zorbit]").first.get_by_role(
            "link", name="Download"
        ).click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    assert file.name == "zorbit.safetensors"
    return file


def assert_loads_and_draws(file: Path, preview: Image.Image) -> None:
    """Loads with plain diffusers: every key is used, none is missing, the image is the same."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    from trainer.families import FAMILIES, LoadedBase
    from trainer.inference.samples import generate

    said = io.StringIO()
    handler = logging.StreamHandler(said)
    diffusers_logging.add_handler(handler)
    pipe = StableDiffusionPipeline.from_pretrained(
        model_files.EMBEDDED_FOLDER, torch_dtype=torch.float32, local_files_only=True
    )
    pipe.load_lora_weights(file, adapter_name="zorbit")
    diffusers_logging.remove_handler(handler)
    assert not [
        line
        for line in said.getvalue().splitlines()
        if "unexpected" in line.lower() or "missing" in line.lower()
    ], said.getvalue()
    loaded = {name for name, _ in pipe.unet.named_parameters() if "lora_" in name} | {
        name for name, _ in pipe.text_encoder.named_parameters() if "lora_" in name
    }
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        saved = [key for key in opened.keys() if not key.endswith(".alpha")]  # noqa: SIM118 (not a mapping)
    assert len(loaded) == len(saved) > 0
    recipe = presets.load_preset("embedded-object").config
    pipe.set_adapters(["zorbit"], [1.1])
    base = LoadedBase(FAMILIES["sd1"], pipe, model_files.inspect(model_files.EMBEDDED_FOLDER))
    picture = generate(
        base,
        prompt=PROMPT,
        negative_prompt="",
        seed=1,
        inference_steps=6,
        guidance_scale=recipe.sampling.guidance_scale,
    )
    difference = ImageChops.difference(picture.convert("RGB"), preview)
    assert max(high for _, high in difference.getextrema()) <= 2, (
        "the downloaded file draws another picture than the preview"
    )
    assert torch.isfinite(next(pipe.unet.parameters())).all()
