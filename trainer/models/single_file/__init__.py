"""Base models in one .safetensors file, in Stability's (LDM) layout.

Such a file contains weights only. Its configurations are the public ones of its family, found in
`trainer/families/configs` and called the template here, with every value that the tensor shapes
determine replaced. Shapes do not determine head sizes, activations and the noise schedule, which
are the same within a family.

`reading` returns all of this. `kinds` decides from the tensor names what a file contains,
`configs` derives configurations from shapes, and `tensor_names` maps LDM names to those that
diffusers and transformers use. Only the header of a file is read, except for one small tensor of
Stable Diffusion 2.
"""

from trainer.models.single_file.configs import CONFIGS_FOLDER, template_config, vae_config
from trainer.models.single_file.kinds import PICKLES, UNET, VAE, describe_kind
from trainer.models.single_file.reading import SingleFile, read_single_file

__all__ = [
    "CONFIGS_FOLDER",
    "PICKLES",
    "UNET",
    "VAE",
    "SingleFile",
    "describe_kind",
    "read_single_file",
    "template_config",
    "vae_config",
]
