"""The diffusers pipelines that can be trained, and the components of each."""

Components = dict[str, set[tuple[str, str]]]
"""Component -> every (library, class) that a model_index.json may name for it.

Diffusers imports whatever it finds there, so everything else is refused.
"""

TOKENIZERS = {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}
STABLE_DIFFUSION: Components = {
    "unet": {("diffusers", "UNet2DConditionModel")},
    "vae": {("diffusers", "AutoencoderKL")},
    "text_encoder": {("transformers", "CLIPTextModel")},
    "tokenizer": TOKENIZERS,
}
STABLE_DIFFUSION_XL: Components = STABLE_DIFFUSION | {
    "text_encoder_2": {("transformers", "CLIPTextModelWithProjection")},
    "tokenizer_2": TOKENIZERS,
}
STABLE_DIFFUSION_3: Components = {
    "transformer": {("diffusers", "SD3Transformer2DModel")},
    "vae": {("diffusers", "AutoencoderKL")},
    "text_encoder": {("transformers", "CLIPTextModelWithProjection")},
    "tokenizer": TOKENIZERS,
    "text_encoder_2": {("transformers", "CLIPTextModelWithProjection")},
    "tokenizer_2": TOKENIZERS,
    "text_encoder_3": {("transformers", "T5EncoderModel")},
    "tokenizer_3": {("transformers", "T5TokenizerFast"), ("transformers", "T5Tokenizer")},
}
PIPELINES: dict[str, Components] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
}
"""Class name of a pipeline -> its components."""

ALL_PARTS = {"scheduler"}.union(*PIPELINES.values())
T5_PARTS = ("text_encoder_3", "tokenizer_3")  # Stable Diffusion 3 also works without them
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # never loaded

DENOISERS = {"unet": "UNet", "transformer": "transformer"}
"""Component -> its name in messages."""

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}
"""Component -> the name of its weights in a diffusers folder, without variant and suffix."""
