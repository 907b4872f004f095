from collections import Counter

import numpy as np
import pytest

from avex_serve.audio.reader import decode
from avex_serve.scheduling.request import Request, answering
from tests.bundles import SAMPLE_RATE, WINDOW
from tests.service.conftest import encode


def test_stages_of_a_recording(engine):
    request = Request()
    with answering(request):
        engine.predict(*decode(encode(0.5, 44100, 2, "WAV")))
    work = request.timings
    windows = -(-SAMPLE_RATE // 2 // WINDOW)
    names = Counter(name for name, _ in work.seconds)
    assert (names["infer"], names["queue"]) == (windows, windows)
    assert work.batches == [1] * windows
    assert work.models == ["tiny"] * windows
    totals = work.totals()
    assert set(totals) == {"decode", "resample", "infer", "queue"}
    assert totals["infer"] == pytest.approx(sum(seconds for name, seconds in work.seconds if name == "infer"))


def test_other_requests_are_not_charged(engine):
    wave = np.zeros(WINDOW, np.float32)
    outer, inner = Request(), Request()
    engine.predict(wave, SAMPLE_RATE)
    with answering(outer), answering(inner):
        engine.predict(wave, SAMPLE_RATE)
    assert len(inner.timings.batches) == 1
    assert outer.timings.seconds == outer.timings.batches == outer.timings.models == []
