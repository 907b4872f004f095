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
