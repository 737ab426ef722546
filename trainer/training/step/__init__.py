"""One optimiser step: from a batch to a loss, to gradients, to moved weights.

`losses` is the forward pass, `optimizer_step` everything after it. `cuda_graphs` replays both
passes of the denoiser on CUDA.
"""
