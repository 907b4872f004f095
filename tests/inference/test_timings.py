import itertools
import math
import time as clock
from collections import Counter

import numpy as np
import pytest

from avex_serve.audio.reader import decode
from avex_serve.scheduling.request import STAGES, Request, StageTime, Timings, answering
from tests.bundles import SAMPLE_RATE, WINDOW
from tests.service.conftest import encode


def test_stages_of_a_recording(engine):
    request = Request()
    with answering(request):
        engine.predict(*decode(encode(0.5, 44100, 2, "WAV")))
    work = request.timings
    windows = -(-SAMPLE_RATE // 2 // WINDOW)
    names = Counter(span.stage for span in work.spans)
    assert (names["infer"], names["queue"]) == (windows, windows)
    assert work.batches == [1] * windows
    assert work.models == [("tiny", "1")] * windows
    assert work.audio == [(("tiny", "1"), pytest.approx(0.5))]
    totals = work.totals()
    assert set(totals) == {"decode", "resample", "infer", "queue"}
    assert 0 < totals["infer"] <= sum(span.end - span.start for span in work.spans if span.stage == "infer")
    assert work.cpu()["infer"] > 0
    assert work.cpu()["queue"] == 0


def test_each_moment_counts_for_one_stage():
    work = Timings()
    work.spans.extend(
        [
            StageTime("queue", 0.0, 2.0, 0.0),
            StageTime("decode", 1.0, 4.0, 2.5),
            StageTime("infer", 3.0, 6.0, 3.0),  # two threads, side by side
            StageTime("infer", 3.5, 7.0, 3.0),
            StageTime("infer", 9.0, 9.0, 0.0),
        ]
    )
    assert work.totals() == {"queue": 1.0, "decode": 2.0, "infer": 4.0}
    assert work.cpu() == {"infer": 6.0, "decode": 2.5, "resample": 0, "queue": 0.0}


def test_a_recording_of_hours_is_summed_at_once():
    """The event loop does it: tens of thousands of spans must not stop it for a tenth of a second."""
    work, random = Timings(), np.random.default_rng(0)
    for start in random.uniform(0, 1000, 20_000).tolist():
        work.spans.append(StageTime(str(random.choice(STAGES)), start, start + random.exponential(0.01), 0.001))
    edges = sorted({time for span in work.spans for time in (span.start, span.end)})
    running, expected = Counter(), Counter()
    changes = sorted([(s.start, 1, s.stage) for s in work.spans] + [(s.end, -1, s.stage) for s in work.spans])
    changes = iter([*changes, (math.inf, 0, STAGES[0])])
    time, change, name = next(changes)
    for start, end in itertools.pairwise(edges):
        while time <= start:
            running[name] += change
            time, change, name = next(changes)
        if first := next((each for each in STAGES if running[each]), None):
            expected[first] += end - start
    begin = clock.thread_time()
    totals = work.totals()
    assert clock.thread_time() - begin < 0.1
    assert totals == pytest.approx(expected)


def test_other_requests_are_not_charged(engine):
    wave = np.zeros(WINDOW, np.float32)
    outer, inner = Request(), Request()
    engine.predict(wave, SAMPLE_RATE)
    with answering(outer), answering(inner):
        engine.predict(wave, SAMPLE_RATE)
    assert len(inner.timings.batches) == 1
    assert outer.timings.spans == outer.timings.batches == outer.timings.models == []
