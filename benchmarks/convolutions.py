"""Compares torch's 3 x 3 convolution of frozen weights on a CPU with one matrix product.

    python -m benchmarks.convolutions [--threads 1] [--repeats 9] [--json FILE]

Prints the median milliseconds of a forward and backward pass: processor time with one thread,
otherwise wall-clock time. `weights` is the number of weights per position, by which
`trainer/models/cpu_conv.py` chooses between the two.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.measuring import keep
from trainer.models import cpu_conv
from trainer.models.libraries import configure_libraries

CHANNELS = (
    (320, 320),
    (640, 640),
    (1280, 640),
    (1920, 640),
    (640, 1280),
    (1280, 1280),
    (2560, 1280),
)
# Images in a batch, and the side of their square feature maps.
INPUTS = ((1, 4), (1, 8), (1, 16), (4, 8), (1, 32))


def milliseconds(layer: nn.Module, x: torch.Tensor, repeats: int, threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        begin = clock()
        torch.autograd.grad(layer(x).sum(), x)
        times.append(clock() - begin)
    return 1000 * statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    configure_libraries()
    torch.set_num_threads(options.threads)
    # Every convolution becomes a matrix product, even those that torch computes faster.
    cpu_conv.WEIGHTS_PER_POSITION = 0
    for inputs, outputs in CHANNELS:
        plain = nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(False)
        matrix = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1)).requires_grad_(False)
        cpu_conv.use_matrix_products(matrix)
        for batch, side in INPUTS:
            x = torch.randn(batch, inputs, side, side, requires_grad=True)
            row = {
                "inputs": inputs,
                "outputs": outputs,
                "pictures": batch,
                "side": side,
                "threads": options.threads,
            }
            row |= {
                name: milliseconds(layer, x, options.repeats, options.threads)
                for name, layer in (("torch", plain), ("product", matrix))
            }
            weights = plain.weight.numel() // (batch * side * side)
            print(
                f"{inputs:5} to {outputs:4}, {batch} x {side:2} x {side:2} {weights:9,} weights"
                f"   torch {row['torch']:7.1f} ms   product {row['product']:7.1f} ms"
                f"   {row['product'] / row['torch']:.2f}",
                flush=True,
            )
            keep(row, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
