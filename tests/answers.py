"""Answers as the JSON that clients get, and recordings as the pipeline reads them."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from avex_serve.audio.reader import AudioStream
from tests.bundles import SAMPLE_RATE


def as_json(answer: Any) -> Any:
    """By the standard library, not by what the service writes it with; without probabilities that aren't known."""

    def known(fields):
        return {name: value for name, value in fields if (name, value) != ("probability", None)}

    return json.loads(json.dumps(asdict(answer, dict_factory=known)))


def in_memory(*blocks: np.ndarray, rate: int = SAMPLE_RATE, frames: int | None = None) -> nullcontext[AudioStream]:
    """A recording of these blocks, opened; without `frames` its length is not known."""
    return nullcontext(AudioStream(blocks, rate, frames))


def program() -> bytes:
    """The bytes of a program that hold six frames of MPEG's layer I, as many programs do."""
    code = np.random.default_rng(0).integers(1, 250, 120_000).astype(np.uint8).tobytes()
    frame = b"\xff\xff\x10\xc4" + code[:28]  # of 32 bytes
    return b"\x7fELF\2\1\1" + code[:3000] + 6 * frame + bytes(500) + code
