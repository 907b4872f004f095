"""Window arithmetic, as properties that hold for every recording."""

from typing import get_args

import numpy as np
import pytest

from avex_serve.audio.windows import FinalClip, batch_windows, cut_windows, hop_samples, plan_windows
from avex_serve.errors import InputError

RATE = 16000


def random_cases(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        length = int(random.integers(1, 60))
        yield (
            int(random.integers(1, 300)),
            length,
            int(random.integers(0, length)),
            int(random.choice([8, 16000, 44100])),
        )


EDGES = [
    (total, length, overlap, RATE)
    for length in (1, 2, 7, 8)
    for overlap in range(length)
    for total in (1, length - 1, length, length + 1, 2 * length - overlap, 2 * length - overlap + 1, 10 * length)
    if total > 0
]
CASES = [*EDGES, *random_cases(400)]


def test_windows_cover_the_recording_with_as_few_as_needed():
    for total, length, overlap, rate in CASES:
        plan = plan_windows(total, length, rate, overlap / rate)
        case = f"{total=} {length=} {overlap=} {rate=}"
        starts = plan.starts.tolist()
        assert plan.hop == length - overlap, case
        assert len(starts) == plan.count, case
        # A remainder of less than a tenth of a window is answered by a window that ends with the recording.
        last = (len(starts) - 1) * plan.hop
        moved = len(starts) > 1 and total - last < length / 10
        assert starts == [*(index * plan.hop for index in range(len(starts) - 1)), total - length if moved else last]
        covered = np.zeros(total, bool)
        for start in starts:
            covered[start : start + length] = True
        assert covered.all(), case
        # One fewer would not reach the end.
        assert len(starts) == 1 or starts[-2] + length < total, case


def test_spans_are_seconds_within_the_recording():
    for total, length, overlap, rate in CASES:
        plan = plan_windows(total, length, rate, overlap / rate)
        spans = plan.spans
        assert spans.dtype == np.float64
        assert spans.shape == (len(plan.starts), 2)
        assert spans[0, 0] == 0
        assert spans[-1, 1] == total / rate
        assert (spans[:-1, 1] - spans[:-1, 0] == pytest.approx(length / rate)) if len(spans) > 1 else True
        assert (spans[:, 1] > spans[:, 0]).all()


def test_cut_gives_the_samples_and_pads_the_last_window_with_zeros():
    for total, length, overlap, rate in CASES:
        plan = plan_windows(total, length, rate, overlap / rate)
        wave = np.arange(1, total + 1, dtype=np.float32)
        padded = np.concatenate([wave, np.zeros(length, np.float32)])
        windows = list(plan.cut(wave))
        assert len(windows) == len(plan.starts)
        for start, window in zip(plan.starts, windows, strict=True):
            assert window.dtype == np.float32
            np.testing.assert_array_equal(window, padded[start : start + length])


def test_times_are_exact_after_a_year():
    # 32-bit arithmetic would overflow after 37 hours at 16 kHz, float32 seconds lose the millisecond after hours.
    total = 365 * 24 * 3600 * RATE
    plan = plan_windows(total, 3600 * RATE, RATE, 0.0)
    assert plan.spans.tolist() == [[hour * 3600, (hour + 1) * 3600] for hour in range(365 * 24)]
    spans = plan_windows(2**40 + 1, 2**39, RATE, 0.0, final_clip="extend").spans
    assert spans[-1].tolist() == [2**40 / RATE, (2**40 + 1) / RATE]


def test_overlap_is_rounded_to_samples():
    assert plan_windows(100, 10, 44100, 3.4 / 44100).hop == 7
    # Less than half a sample below the window: still one sample further each time.
    assert plan_windows(100, 10, 44100, 9.9 / 44100).hop == 1


@pytest.mark.parametrize("overlap", [-1e-9, -1.0, 0.1, 0.2, float("nan"), float("inf"), -float("inf")])
def test_refuses_an_overlap_that_leads_nowhere(overlap):
    with pytest.raises(InputError, match=rf"overlap is {overlap} s; .* window of 0\.1 s"):
        plan_windows(16000, 1600, RATE, overlap)


def blocks_of(wave, random):
    """The wave in blocks of random sizes, empty ones among them."""
    ends = np.sort(random.integers(0, wave.size + 1, random.integers(0, 12)))
    return np.split(wave, ends)


@pytest.mark.parametrize("final_clip", get_args(FinalClip))
def test_a_stream_is_cut_as_the_whole(final_clip):
    random = np.random.default_rng(1)
    for total, length, overlap, rate in CASES:
        shortest = int(random.integers(1, length + 1))
        wave = random.normal(size=total).astype(np.float32)
        plan = plan_windows(total, length, rate, overlap / rate, shortest, final_clip)
        hop = hop_samples(length, rate, overlap / rate)
        cut = cut_windows(blocks_of(wave, random), length, hop, shortest, final_clip)
        if final_clip == "none" and total < length:
            assert plan.count == 0
            with pytest.raises(InputError, match=f"{total} of {length} samples"):
                list(cut)
            continue
        windows = list(cut)
        assert [window.start for window in windows] == list(plan.starts)
        np.testing.assert_array_equal([(w.start, w.stop) for w in windows] / np.float64(rate), plan.spans)
        for window in windows:
            size = window.stop - window.start
            np.testing.assert_array_equal(window.samples[:size], wave[window.start : window.stop])
            assert not window.samples[size:].any()
            assert window.samples.size == max(size, length if final_clip == "extend" else shortest)


def test_what_happens_to_the_end():
    wave = np.arange(1, 24, dtype=np.float32)
    for final_clip, spans, last in (
        ("none", [[0, 10], [10, 20]], [*range(11, 21)]),
        ("remainder", [[0, 10], [10, 20], [20, 23]], [21, 22, 23, 0]),
        ("extend", [[0, 10], [10, 20], [20, 23]], [21, 22, 23, *[0] * 7]),
        ("full", [[0, 10], [10, 20], [13, 23]], [*range(14, 24)]),
    ):
        plan = plan_windows(23, 10, 1, 0.0, 4, final_clip)
        assert plan.spans.tolist() == spans
        assert [*plan.cut(wave)][-1].tolist() == last


@pytest.mark.parametrize("most", [1, 3, 100])
def test_batches_hold_windows_of_one_length_with_their_padding(most):
    wave = np.arange(1, 24, dtype=np.float32)
    for masked in (False, True):
        all_bounds, batches = zip(
            *batch_windows(cut_windows([wave], 5, 4, 4), most, padding_mask=masked), strict=True
        )
        assert [len(bounds) for bounds in all_bounds] == {1: [1] * 6, 3: [3, 2, 1], 100: [5, 1]}[most]
        bounds = np.concatenate(all_bounds)
        assert bounds.tolist() == [[0, 5], [4, 9], [8, 13], [12, 17], [16, 21], [20, 23]]
        assert batches[-1][0].tolist() == [[21, 22, 23, 0]]
        if masked:
            assert not any(inputs[1].any() for inputs in batches[:-1])
            assert batches[-1][1].tolist() == [[False, False, False, True]]
        assert all(len(inputs) == 1 + masked for inputs in batches)
