"""Clips that were cut from one recording, as far as their names say so. Needs no torch.

A clip is named after its recording and its place in it, in one of these ways:

    rec1_10.0s_15.0s    start and end, as far apart as the clip is long (BirdNET-Analyzer, OpenSoundscape)
    rec1_seg3           a word for a part, after a name with a digit
    20240501_060000_3   a number after the name that a recorder or Xeno-canto gives
    rec1_000, rec1_010  multiples of the clips' length, in more names than chance explains

`robin_1` and `robin_2` are no such clips: people number independent recordings so.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from avex_serve.audio.recorder import from_name

_SPAN: Final = re.compile(r"(.*[^\W_])[ _-]+(\d+(?:\.\d+)?)s?[ _-]+(\d+(?:\.\d+)?)s?")
_CONFIDENCE: Final = re.compile(r"[01]\.\d+_\d+_")  # in front of BirdNET-Analyzer's names
_PART: Final = re.compile(
    r"(.*\d.*?)[ _-]+(?:seg|segment|clip|chunk|part|slice|win|window|offset)[ _-]*\d+", re.IGNORECASE
)
_NUMBERED: Final = re.compile(r"(.*[^\W_])[ _-]+(\d+(?:\.\d+)?)s?")
_CATALOGUED: Final = re.compile(r"\bXC\d{4,}\b", re.IGNORECASE)
_CHANCE: Final = 1e-3  # the largest probability that all numbers are multiples of the clips' length by accident
_MOST: Final = 0.9  # share of numbers that must be
_SAME: Final = 0.1  # seconds that lengths may differ by


def recordings_of(stems: Sequence[str], seconds: Sequence[float]) -> list[str | None]:
    """The name of the longer recording that each clip was cut from; None: nothing says so.

    Args:
        stems: names of the files, without folders and suffixes.
        seconds: lengths of the clips.
    """
    found = [_recording_of(stem, length) for stem, length in zip(stems, seconds, strict=True)]
    numbered = {
        i: (each[1], float(each[2]))
        for i, stem in enumerate(stems)
        if found[i] is None and (each := _NUMBERED.fullmatch(stem)) is not None
    }
    numbers: dict[str, set[float]] = defaultdict(set)
    for name, number in numbered.values():
        numbers[name].add(number)
    numbered = {i: each for i, each in numbered.items() if len(numbers[each[0]]) > 1}
    length = _length(seconds[i] for i in numbered)
    multiples = {i: name for i, (name, number) in numbered.items() if length > 1 and number % length == 0}
    if len(multiples) > _MOST * len(numbered) and float(length) ** -len(multiples) <= _CHANCE:
        for i, name in multiples.items():
            found[i] = name
    return found


def _recording_of(stem: str, seconds: float) -> str | None:
    """The recording that the name of a clip tells, together with its length."""
    if (span := _SPAN.fullmatch(stem)) is not None and abs(float(span[3]) - float(span[2]) - seconds) <= _SAME:
        return _CONFIDENCE.sub("", span[1], count=1)
    if (part := _PART.fullmatch(stem)) is not None:
        return part[1]
    if (each := _NUMBERED.fullmatch(stem)) is not None and (
        from_name(f"{each[1]}.wav").start is not None or _CATALOGUED.search(each[1])
    ):
        return each[1]
    return None


def _length(seconds: Iterable[float]) -> int:
    """The most frequent length in whole seconds; 0: none is nearly whole."""
    whole = Counter(round(each) for each in seconds if abs(each - round(each)) <= _SAME)
    return whole.most_common(1)[0][0] if whole else 0
