"""Convolutions with many weights over few positions, computed on a CPU as one matrix product.

oneDNN reorders the weights at every call. Over the 8 x 8 positions of the lowest UNet levels that
takes longer than the arithmetic, while a matrix product reads the weights in their stored order.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

WEIGHTS_PER_POSITION = 100_000
"""Above this number the matrix product is faster, forward and backward, on one thread and on two
(benchmarks/convolutions.py)."""


class MatrixConv2d(nn.Conv2d):
    """A 3 x 3 convolution that becomes a matrix product when that is faster.

    Results differ from `nn.Conv2d` by rounding only. The columns are im2col's (Chellapilla et al.
    2006, "High Performance Convolutional Neural Networks for Document Processing").
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x, [B, in_channels, H, W], to [B, out_channels, H, W]."""
        batch, _, height, width = x.shape
        pays = self.weight.numel() > WEIGHTS_PER_POSITION * batch * height * width
        if not pays or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        columns = unfold(x, self.kernel_size, padding=self.padding)  # [B, inputs * 9, H * W]
        columns = columns.transpose(0, 1).flatten(1)  # [inputs * 9, B * H * W]
        weight = self.weight.flatten(1)
        if self.bias is None:
            product = weight @ columns
        else:
            product = torch.addmm(self.bias[:, None], weight, columns)
        return product.view(-1, batch, height, width).transpose(0, 1).contiguous()


def use_matrix_products(denoiser: nn.Module) -> None:
    """Replaces the 3 x 3 convolutions that keep the size of their input by MatrixConv2d.

    The replacements share the parameters of the originals, and the names of all parameters stay.
    """
    for parent in list(denoiser.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d and _keeps_size(layer):
                setattr(parent, name, _matrix_conv(layer))


def _matrix_conv(layer: nn.Conv2d) -> MatrixConv2d:
    """Returns a MatrixConv2d with the parameters of a convolution."""
    new = MatrixConv2d(
        layer.in_channels,
        layer.out_channels,
        kernel_size=3,
        padding=1,
        bias=layer.bias is not None,
        device="meta",  # allocates nothing; the parameters are replaced below
    )
    new.weight, new.bias = layer.weight, layer.bias
    new.train(layer.training)
    return new


def _keeps_size(layer: nn.Conv2d) -> bool:
    """Returns whether the output has the height and width of the input (one group, 3 x 3)."""
    has_one_group = layer.weight.shape[1:] == (layer.in_channels, 3, 3)
    one_step = layer.padding == layer.stride == layer.dilation == (1, 1)
    return bool(has_one_group and one_step and layer.padding_mode == "zeros")
