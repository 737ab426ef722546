"""Generates samples for another process, which sends one JSON request a line."""

import json
import sys
import time
from typing import Any, TextIO

import torch

from trainer.errors import TrainerError
from trainer.inference.request import parse_request
from trainer.inference.samples import Sampler

MAX_REASON_LENGTH = 200


def serve(requests: TextIO = sys.stdin, replies: TextIO = sys.stdout) -> None:
    """Answers each line with one line of JSON until the input ends.

    A reply is {"file", "seconds"} or {"error": message}.
    """
    sampler = Sampler()
    for line in requests:
        print(json.dumps(_reply(sampler, line)), file=replies, flush=True)


def _reply(sampler: Sampler, line: str) -> dict[str, Any]:
    started = time.monotonic()
    try:
        file = sampler.render(parse_request(json.loads(line)))
    except TrainerError as error:
        return {"error": str(error)}
    except torch.OutOfMemoryError:
        return {
            "error": "The device has not enough free memory for this image. Choose a smaller "
            "size, or wait until the training has ended."
        }
    except (ValueError, RuntimeError, OSError) as error:
        print(f"preview failed: {error!r}", file=sys.stderr, flush=True)
        reason = (str(error).splitlines() or ["unknown error"])[0][:MAX_REASON_LENGTH]
        return {"error": f"The image could not be generated: {reason}"}
    return {"file": str(file), "seconds": round(time.monotonic() - started, 2)}
