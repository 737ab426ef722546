"""A 3 x 3 convolution of frozen weights on a CPU, forward and backward: torch's own beside one matrix product (trainer/convolutions.py).

    python -m benchmarks.convolutions [--threads 1] [--repeats 9] [--json FILE]

Milliseconds, the median; of the processor with one thread, else of the wall clock. `weights` is how many there are for each position,
which is what decides between the two in the program.
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
POSITIONS = (
    (1, 4),
    (1, 8),
    (1, 16),
    (4, 8),
    (1, 32),
)  # pictures, and the side of the square that is seen of each


def milliseconds(layer: nn.Module, x: torch.Tensor, repeats: int, threads: int) -> float:
    clock, times = time.process_time if threads == 1 else time.perf_counter, []
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
    cpu_conv.WEIGHTS_PER_POSITION = 0  # each as a matrix product, whether it pays or not
    for inputs, outputs in CHANNELS:
        plain = nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(False)
        matrix = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1)).requires_grad_(False)
        cpu_conv.use_matrix_products(matrix)
        for pictures, side in POSITIONS:
            x = torch.randn(pictures, inputs, side, side, requires_grad=True)
            row = {
                "inputs": inputs,
                "outputs": outputs,
                "pictures": pictures,
                "side": side,
                "threads": options.threads,
            }
            row |= {
                name: milliseconds(layer, x, options.repeats, options.threads)
                for name, layer in (("torch", plain), ("product", matrix))
            }
            weights = plain.weight.numel() // (pictures * side * side)
            print(
                f"{inputs:5} to {outputs:4}, {pictures} x {side:2} x {side:2} {weights:9,} weights"
                f"   torch {row['torch']:7.1f} ms   product {row['product']:7.1f} ms   {row['product'] / row['torch']:.2f}",
                flush=True,
            )
            keep(row, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
