"""What a request may use: the decoder, the windows and the batches ask for it."""

import io
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from avex_serve import open_bundle
from avex_serve.audio.reader import decode
from avex_serve.errors import ClientGoneError, DeadlineError, OverloadError, TooLargeError
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from avex_serve.inference.results import detect
from avex_serve.inference.scores import Selection
from avex_serve.scheduling.request import Limits, Memory, Request, answering, current
from tests.answers import in_memory
from tests.bundles import DIM, SAMPLE_RATE, WINDOW, make_measuring_bundle, make_sequence_bundle


def allow(yield_slot=lambda: None, seconds_left=math.inf, **limits):
    """A request with these limits, for the length of a block."""
    request = Request(limits=Limits(**limits), seconds=seconds_left)
    request.yield_slot = yield_slot
    return answering(request)


def encoded(frames, channels=1, rate=SAMPLE_RATE, container="FLAC"):
    file = io.BytesIO()
    soundfile.write(file, np.zeros((frames, channels), np.float32), rate, format=container)
    return file.getvalue()


def test_nothing_is_limited_by_default():
    assert current().limits == Limits(*[math.inf] * 8)
    current().checkpoint()


def test_current_within_the_block():
    with allow(seconds=1):
        assert current().limits.seconds == 1
    assert current().limits.seconds == math.inf


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 9.9}, "longer than 9.9 s"),
        ({"decoded_bytes": 4 * 2 * 160_000 - 1}, "more than 1279999 bytes once decoded"),
        ({"channels": 1}, "has 2 channels; expected at most 1"),
    ],
)
def test_recording_that_says_it_is_too_large(limits, message):
    with allow(**limits), pytest.raises(TooLargeError, match=message):
        decode(encoded(160_000, channels=2))


def test_recording_at_the_limits():
    with allow(seconds=10, decoded_bytes=4 * 2 * 160_000, channels=2):
        assert decode(encoded(160_000, channels=2)).wave.size == 160_000


def silence_of_unknown_length(frames):
    """FLAC whose header leaves open how long it is, as encoders of streams write it."""
    data = bytearray(encoded(frames))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


@pytest.mark.parametrize("limits", [{"seconds": 600}, {"decoded_bytes": 4 * 600 * SAMPLE_RATE}])
def test_decoding_stops_where_the_header_does_not_say(limits):
    data = silence_of_unknown_length(3600 * SAMPLE_RATE)
    assert len(data) < 2**19
    steps = []
    with allow(lambda: steps.append(1), **limits), pytest.raises(TooLargeError):
        decode(data)
    assert 0 < len(steps) < 50  # of 220 blocks


def test_many_channels_are_decoded_in_small_blocks(monkeypatch):
    largest = 0
    read = soundfile.SoundFile.read

    def noting(self, *arguments, **options):
        nonlocal largest
        samples = read(self, *arguments, **options)
        largest = max(largest, samples.size)
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", noting)
    assert decode(encoded(10_000, channels=500, container="WAV")).wave.size == 10_000
    assert largest <= 2**20


def test_clips_are_limited_but_for_a_window(tmp_path):
    with open_bundle(make_measuring_bundle(tmp_path / "bundle", shortest=600)) as engine:
        for limit, longest in ((0.2, 3200), (0.05, WINDOW)):
            with allow(clip_seconds=limit):
                engine.infer(np.ones((1, longest), np.float32))
                taken = f"clip of {longest + 1} samples is longer than {longest / SAMPLE_RATE:g} s"
                with pytest.raises(TooLargeError, match=taken):
                    engine.infer(np.ones((1, longest + 1), np.float32))


def test_sequences_of_embeddings_are_limited(tmp_path):
    with open_bundle(make_sequence_bundle(tmp_path / "bundle")) as engine, allow(steps=5):
        assert engine.classify(np.ones((2, 5, DIM), np.float32)).results
        with pytest.raises(TooLargeError, match="a sequence has 6 embeddings; expected at most 5"):
            engine.classify(np.ones((2, 6, DIM), np.float32))


def test_windows_are_limited(audio_bundle):
    wave = np.zeros(WINDOW * 3, np.float32)
    with open_bundle(audio_bundle) as engine, allow(windows=3):
        assert len(engine.score(wave, SAMPLE_RATE).scores) == 3
        with pytest.raises(TooLargeError, match="has 5 windows; expected at most 3"):
            engine.score(wave, SAMPLE_RATE, overlap=0.05)


def test_too_many_windows_are_refused_before_any_is_run(audio_bundle):
    runs = []
    with open_bundle(audio_bundle) as engine, allow(windows=3):
        engine.score(np.zeros(30, np.float32), 100)
        engine.backend.run = runs.append
        with pytest.raises(TooLargeError, match="has 4 windows; expected at most 3"):
            engine.score(np.zeros(31, np.float32), 100)
    assert runs == []


def test_windows_are_counted_where_the_header_does_not_say(audio_bundle):
    def record(channel):
        return in_memory(*[np.zeros(WINDOW, np.float32)] * 100)

    with open_bundle(audio_bundle) as engine:
        with allow(windows=100):
            assert len(pipeline.predict(engine, record, Query(threshold=0.0)).detections) == 300
        with allow(windows=99), pytest.raises(TooLargeError, match="has 100 windows; expected at most 99"):
            pipeline.predict(engine, record, Query())


@pytest.mark.parametrize(
    ("ask", "size"),
    [
        (lambda engine, wave: engine.predict(wave, SAMPLE_RATE, threshold=0.0), 30 * 3 * 512),
        (lambda engine, wave: engine.predict(wave, SAMPLE_RATE, top_k=2), 30 * 2 * 512),
        (lambda engine, wave: engine.predict_all(wave, SAMPLE_RATE, threshold=0.0), 30 * 3 * 512),
        (lambda engine, wave: engine.embed(wave, SAMPLE_RATE), 30 * DIM * 16),
        (lambda engine, wave: pipeline.embed(engine, lambda channel: in_memory(wave), Query()), 30 * DIM * 96),
        (lambda engine, wave: engine.infer(wave.reshape(30, WINDOW)), 30 * (DIM + 3) * 16),
    ],
)
def test_what_an_answer_takes_is_limited(audio_bundle, ask, size):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 30 * WINDOW).astype(np.float32)
    with open_bundle(audio_bundle) as engine:
        with allow(answer_bytes=size):
            ask(engine, wave)
        with allow(answer_bytes=size - 1), pytest.raises(TooLargeError, match=f"takes {size} bytes"):
            ask(engine, wave)
        memory = Memory(size - 1)
        request = Request(answers=memory)
        with answering(request), pytest.raises(OverloadError, match="other requests hold all but"):
            ask(engine, wave)
        request.release_memory()
        memory.reserve(size - 1)


def test_scores_of_embeddings_are_limited(embedding_bundle):
    embeddings = np.ones((20, DIM), np.float32)
    size = 20 * (3 * 16 + 2 * 512)
    with open_bundle(embedding_bundle) as engine:
        with allow(answer_bytes=size):
            assert [len(row) for row in engine.classify(embeddings, top_k=2).results] == [2] * 20
        with allow(answer_bytes=size - 1), pytest.raises(TooLargeError, match="raise threshold or lower top_k"):
            engine.classify(embeddings, top_k=2)


def test_nobody_waits_for_the_labels_of_many_windows():
    """A few of them are a step, but the last ones none: an answer that is nearly made isn't worth another turn."""
    steps = []
    selection = Selection.of("sigmoid", 0.0, None)

    def yield_slot():
        steps.append(1)
        if len(steps) == 5:
            current().abandon()

    with allow(yield_slot), pytest.raises(ClientGoneError):
        detect(np.zeros((10_000, 2)), np.ones((10_000, 3), np.float32), "abc", selection)
    assert len(steps) == 5
    with allow(yield_slot):
        assert len(detect(np.zeros((300, 2)), np.ones((300, 3), np.float32), "abc", selection)) == 900
    assert len(steps) == 5


@pytest.mark.parametrize(
    ("seconds", "leave", "error"), [(math.inf, True, ClientGoneError), (0, False, DeadlineError)]
)
def test_engine_asks_between_windows(audio_bundle, seconds, leave, error):
    ran = []

    def yield_slot():
        if len(ran) > 10 and leave:
            current().abandon()

    with open_bundle(audio_bundle) as engine:
        run = engine.backend.run
        engine.backend.run = lambda batch: ran.append(1) or run(batch)
        with allow(yield_slot, seconds), pytest.raises(error):
            engine.score(np.zeros(WINDOW * 1000, np.float32), SAMPLE_RATE)
    assert len(ran) < 100


def test_windows_of_a_short_recording_run_between_those_of_a_long_one(audio_bundle):
    order, began = [], threading.Event()
    with open_bundle(audio_bundle) as engine, ThreadPoolExecutor(1) as pool:
        run = engine.backend.run

        def noting(batch):
            order.append(float(batch[0, 0]))
            began.set()
            time.sleep(0.001)
            return run(batch)

        engine.backend.run = noting
        long = pool.submit(engine.score, np.ones(WINDOW * 1000, np.float32), SAMPLE_RATE)
        assert began.wait(20)
        engine.score(np.full(WINDOW, 0.5, np.float32), SAMPLE_RATE)
        long.result()
    assert order.count(1.0) == 1000
    assert order.index(0.5) < 900


def test_memory_is_shared_and_given_back():
    memory = Memory(10)
    first, second = Request(bodies=memory), Request(bodies=memory)
    first.extend_body(6)
    with pytest.raises(OverloadError, match="all but 4 of its 10 bytes"):
        second.extend_body(5)
    second.extend_body(4)
    first.release_memory()
    first.release_memory()
    second.check_body(6)
    with pytest.raises(OverloadError):
        second.check_body(7)


@pytest.mark.parametrize(("own", "clients", "left"), [(60, None, 60), (60, 5, 5), (5, 60, 5), (math.inf, 7, 7)])
def test_the_shorter_time_limit_counts(own, clients, left):
    request = Request(seconds=own)
    request.limit_seconds(clients)
    assert left - 1 < request.remaining <= left
