"""Convolutions with many weights over few positions, on a CPU, as one matrix product each.

oneDNN lays the weights out anew at every call. Over the 8 x 8 positions of a UNet's lowest levels that takes longer than the arithmetic,
while a matrix product reads them as they lie.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

WEIGHTS_PER_POSITION = 100_000
"""With more than these the matrix product is the faster, forward and backward, on one thread and on two (benchmarks/convolutions.py)."""


class MatrixConv2d(nn.Conv2d):
    """A 3 x 3 convolution that is a matrix product where that pays; the results differ by rounding alone.

    The columns are those of im2col (Chellapilla et al. 2006, "High Performance Convolutional Neural Networks for Document Processing").
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] to [B, outputs, H, W]."""
        batch, _, height, width = x.shape
        few = self.weight.numel() > WEIGHTS_PER_POSITION * batch * height * width
        if not few or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        columns = (
            unfold(x, self.kernel_size, padding=self.padding).transpose(0, 1).flatten(1)
        )  # [inputs * 9, B * H * W]
        weight = self.weight.flatten(1)
        product = (
            weight @ columns
            if self.bias is None
            else torch.addmm(self.bias[:, None], weight, columns)
        )
        return product.view(-1, batch, height, width).transpose(0, 1).contiguous()


def use_matrix_products(denoiser: nn.Module) -> None:
    """For the 3 x 3 convolutions that keep the size of what they see, as those of a UNet's blocks do."""
    for layer in denoiser.modules():
        if type(layer) is nn.Conv2d and _keeps_size(layer):
            layer.__class__ = MatrixConv2d


def _keeps_size(layer: nn.Conv2d) -> bool:
    of_one_group = layer.weight.shape[1:] == (layer.in_channels, 3, 3)
    return (
        of_one_group
        and layer.padding == layer.stride == layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
    )
