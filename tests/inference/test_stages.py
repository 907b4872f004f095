import numpy as np
import pytest

from avex_serve.audio.reader import decode
from avex_serve.scheduling.stages import recorded
from tests.bundles import SAMPLE_RATE, WINDOW
from tests.service.conftest import encode


def test_stages_of_a_recording(engine):
    with recorded() as work:
        engine.predict(*decode(encode(0.5, 44100, 2, "WAV")))
    windows = -(-SAMPLE_RATE // 2 // WINDOW)
    names = [name for name, _ in work.seconds]
    assert names[:2] == ["decode", "resample"]
    assert sorted(names[2:]) == ["infer"] * windows + ["queue"] * windows
    assert work.batches == [1] * windows
    assert work.models == ["tiny"] * windows
    totals = work.totals()
    assert set(totals) == {"decode", "resample", "infer", "queue"}
    assert totals["infer"] == pytest.approx(sum(seconds for name, seconds in work.seconds if name == "infer"))


def test_nothing_is_written_down_for_others(engine):
    wave = np.zeros(WINDOW, np.float32)
    with recorded() as work:
        pass
    engine.predict(wave, SAMPLE_RATE)
    assert work.seconds == work.batches == work.models == []
    with recorded() as outer:
        with recorded() as inner:
            engine.predict(wave, SAMPLE_RATE)
        assert len(inner.batches) == 1
    assert outer.batches == []
