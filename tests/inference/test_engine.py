"""The engine's answers, against numpy, soxr and torch's activations."""

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soxr
import torch

from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle
from avex_serve.errors import AudioError, InputError, NotFoundError, TensorError, UnsupportedError
from avex_serve.inference import pipeline
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query
from avex_serve.inference.results import known
from avex_serve.inference.scores import Selection, activate
from tests.answers import as_json, in_memory
from tests.bundles import DIM, HEAD, LABELS, PROBE, SAMPLE_RATE, WINDOW, copy_bundle, replace_file, weights

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, -1),
    "none": lambda logits: logits,
}
SCALES = {"sigmoid": "sigmoid", "softmax": "softmax", "none": "logits"}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def scores_of(logits, activation):
    return ACTIVATIONS[activation](torch.from_numpy(np.asarray(logits, np.float64))).numpy()


def detected(prediction):
    return [(d.start, d.end, d.label) for d in prediction.detections]


def expected_detections(spans, scores, threshold=-np.inf, top_k=None):
    return [
        (start, end, LABELS[index])
        for (start, end), row in zip(spans.tolist(), scores, strict=True)
        for index in sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
        if row[index] >= threshold
    ]


@pytest.mark.parametrize("overlap", [0.0, 0.03, 0.05, 0.099])
@pytest.mark.parametrize("samples", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 11680])
def test_scores_embeddings_and_raw_outputs(engine, oracle, samples, overlap):
    wave = np.random.default_rng(samples).normal(size=samples).astype(np.float32)
    spans, embeddings, logits = oracle(wave, overlap)
    scored = engine.score(wave, SAMPLE_RATE, overlap=overlap)
    np.testing.assert_array_equal(scored.spans, spans)
    np.testing.assert_allclose(scored.scores, scores_of(logits, "sigmoid"), **CLOSE)
    embedded = engine.embed(wave, SAMPLE_RATE, overlap=overlap)
    np.testing.assert_array_equal(embedded.spans, spans)
    np.testing.assert_allclose(embedded.embeddings, embeddings, **CLOSE)
    raw = engine.infer_recording(wave, SAMPLE_RATE, overlap=overlap)
    assert list(raw) == ["logits", "embedding"]
    np.testing.assert_allclose(raw["logits"], logits, **CLOSE)
    np.testing.assert_array_equal(raw["embedding"], embedded.embeddings)
    assert {array.dtype for array in (scored.scores, embedded.embeddings, *raw.values())} == {np.dtype(np.float32)}


def test_activations(any_engine, oracle, wave):
    activation = any_engine.probe(None).activation
    scores = scores_of(oracle(wave)[2], activation)
    np.testing.assert_allclose(any_engine.score(wave, SAMPLE_RATE).scores, scores, **CLOSE)
    prediction = any_engine.predict(wave, SAMPLE_RATE, top_k=3)
    assert prediction.score_scale == SCALES[activation]
    np.testing.assert_allclose([d.score for d in prediction.detections], -np.sort(-scores, axis=1).ravel(), **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_logits(activation):
    values = np.array([-1000, -100, -88.8, -1e-8, 0, 1e-8, 17, 88.8, 100, 1000, -3e38, 3e38], np.float32)
    logits = np.stack(np.meshgrid(values, values, values), -1).reshape(-1, 3)
    scores = activate(logits, activation)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    with np.errstate(under="ignore"):
        np.testing.assert_allclose(scores, scores_of(logits, activation), rtol=1e-5, atol=1e-37)


def test_extreme_logits_through_the_engine(any_engine, oracle, wave, monkeypatch):
    monkeypatch.setattr(pipeline, "LOUDEST", np.inf)
    # A thousand times as loud as audio is: logits of some thousands.
    loud = wave * np.float32(1000)
    logits = oracle(loud)[2]
    assert abs(logits).max() > 1000
    scores = any_engine.score(loud, SAMPLE_RATE).scores
    expected = scores_of(logits, any_engine.probe(None).activation)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-3)
    assert len(any_engine.predict(loud, SAMPLE_RATE, top_k=3).detections) == scores.size


def test_a_result_that_is_not_finite_is_refused(engine, audio_bundle, monkeypatch):
    monkeypatch.setattr(pipeline, "LOUDEST", np.inf)
    wave = np.float32(3e38) * np.sign(weights(audio_bundle)[0][:, 0])
    for ask in (engine.score, engine.predict, engine.embed, engine.infer_recording):
        with pytest.raises(TensorError, match="is not finite"):
            ask(wave, SAMPLE_RATE)


def test_prediction_without_options(any_engine, oracle, wave):
    activation = any_engine.probe(None).activation
    spans, _, logits = oracle(wave)
    scores = scores_of(logits, activation)
    prediction = any_engine.predict(wave, SAMPLE_RATE)
    expected = expected_detections(spans, scores, threshold=0.0 if activation == "none" else 0.5)
    assert 0 < len(expected) < scores.size, "the threshold has something to decide"
    assert detected(prediction) == expected
    document = asdict(prediction)
    del document["detections"]
    assert document == {
        "bundle": "tiny",
        "version": "1",
        "probe": "linear",
        "trained": True,
        "duration": 0.73,
        "window": 0.1,
        "overlap": 0.0,
        "score_scale": SCALES[activation],
        "warnings": (),
    }


def test_doubtful_questions_are_answered_with_a_warning(engine, any_engine, offline, wave):
    assert engine.predict(wave, SAMPLE_RATE, threshold=0, top_k=1).warnings == ()
    below = [
        engine.predict(wave, SAMPLE_RATE, threshold=-1),
        engine.predict_all(wave, SAMPLE_RATE, threshold=-1)[0],
        offline.classify(np.zeros((1, DIM), np.float32), threshold=-1),
    ]
    for answer in below:
        assert [warning.split(":")[0] for warning in answer.warnings] == [
            f"threshold is -1, and no {answer.score_scale} score is below 0"
        ]
    # Recorders with 32-bit floats go a little beyond full scale.
    loudest = np.float32(0.9) * wave / abs(wave).max()
    for gain, doubtful in ((2, False), (8, True)):
        warnings = any_engine.predict(gain * loudest, SAMPLE_RATE).warnings
        assert [f"reach {0.9 * gain:g}" in warning for warning in warnings] == [True] * doubtful
    if any_engine.probe(None).activation == "none":
        assert any_engine.predict(wave, SAMPLE_RATE, threshold=-50).warnings == ()


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4, 1000])
@pytest.mark.parametrize("threshold", [None, -1.0, 0.0, 0.4, 0.6, 1.0])
def test_threshold_and_top_k_are_independent(engine, oracle, wave, threshold, top_k):
    spans, _, logits = oracle(wave, 0.02)
    scores = scores_of(logits, "sigmoid")
    lowest = threshold if threshold is not None else 0.5 if top_k is None else -np.inf
    prediction = engine.predict(wave, SAMPLE_RATE, threshold=threshold, top_k=top_k, overlap=0.02)
    assert detected(prediction) == expected_detections(spans, scores, lowest, top_k)
    assert all(d.score >= lowest for d in prediction.detections)
    assert prediction.overlap == 0.02


def test_top_k_alone_reports_low_scores(offline):
    # Softmax over three labels, all embeddings alike: two of the three scores are below 0.5.
    result = offline.classify(np.ones((2, DIM), np.float32), top_k=3)
    assert [len(row) for row in result.results] == [3, 3]
    assert min(each.score for each in result.results[0]) < 0.5


def test_ties_stay_in_the_order_of_the_labels(engine):
    silence = np.zeros(2 * WINDOW, np.float32)
    spans = [(0.0, 0.1), (0.1, 0.2)]
    # All scores are exactly the default threshold, which they reach.
    for options, count in (({}, 3), ({"top_k": 2}, 2), ({"threshold": 0.5}, 3), ({"threshold": 0.5000001}, 0)):
        prediction = engine.predict(silence, SAMPLE_RATE, **options)
        assert detected(prediction) == [(*span, label) for span in spans for label in LABELS[:count]]


def test_a_reported_score_given_as_threshold_is_reached_again(engine, wave):
    scores = sorted(d.score for d in engine.predict(wave, SAMPLE_RATE, threshold=0.0).detections)
    for rank, score in enumerate(scores):
        again = engine.predict(wave, SAMPLE_RATE, threshold=score)
        assert sorted(d.score for d in again.detections) == scores[rank:]
    # A hair above, less than float32 can tell: the highest one fails.
    assert engine.predict(wave, SAMPLE_RATE, threshold=np.nextafter(scores[-1], 2)).detections == []


def test_the_last_detection_ends_with_the_recording(engine):
    prediction = engine.predict(np.ones(WINDOW + 400, np.float32), SAMPLE_RATE, top_k=1)
    assert [(d.start, d.end) for d in prediction.detections] == [(0, 0.1), (0.1, (WINDOW + 400) / SAMPLE_RATE)]
    assert prediction.duration == prediction.detections[-1].end


def test_an_end_of_a_few_samples_is_no_evidence(engine):
    """The last window is moved back instead, unless the user chooses otherwise."""
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, WINDOW + 40).astype(np.float32)
    end = (WINDOW + 40) / SAMPLE_RATE
    for options, last in (
        ({}, (40 / SAMPLE_RATE, end)),
        ({"final_clip": "full"}, (40 / SAMPLE_RATE, end)),
        ({"final_clip": "extend"}, (0.1, end)),
        ({"final_clip": "none"}, (0.0, 0.1)),
    ):
        prediction = engine.predict(wave, SAMPLE_RATE, top_k=1, **options)
        assert (prediction.detections[-1].start, prediction.detections[-1].end) == last
        assert prediction.duration == end
    moved = engine.score(wave, SAMPLE_RATE).scores[-1]
    np.testing.assert_allclose(moved, engine.score(wave[40:], SAMPLE_RATE).scores[0], **CLOSE)
    with pytest.raises(InputError, match=r"shorter than a window .*, and final_clip is none"):
        engine.predict(wave[:100], SAMPLE_RATE, final_clip="none")


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
def test_other_rates_are_resampled(engine, oracle, rate):
    wave = np.random.default_rng(rate).normal(size=int(0.33 * rate)).astype(np.float32)
    spans, embeddings, _ = oracle(soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ"))
    embedded = engine.embed(wave, rate)
    np.testing.assert_array_equal(embedded.spans, spans)
    np.testing.assert_allclose(embedded.embeddings, embeddings, **CLOSE)
    assert engine.predict(wave, rate).duration == spans[-1, 1] == pytest.approx(0.33, abs=1 / SAMPLE_RATE)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_waves_of_any_float_type_and_layout(engine, wave, dtype):
    small = (wave / 8).astype(dtype)
    scores = engine.score(small.astype(np.float32), SAMPLE_RATE).scores
    np.testing.assert_array_equal(engine.score(small, SAMPLE_RATE).scores, scores)
    strided = np.zeros(2 * small.size, dtype)
    strided[::2] = small
    strided.flags.writeable = False
    np.testing.assert_array_equal(engine.score(strided[::2], SAMPLE_RATE).scores, scores)


@pytest.mark.parametrize(
    ("wave", "expected"),
    [
        (np.zeros((2, WINDOW), np.float32), r"shape \(2, 1600\)"),
        (np.zeros((), np.float32), r"shape \(\)"),
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros(WINDOW, np.int16), "type int16"),
        (np.zeros(WINDOW, complex), "type complex128"),
        (np.full(WINDOW, "a"), "type <U1"),
        (np.array([0, np.nan], np.float32), "NaN"),
        (np.array([0, -np.inf]), "NaN"),
        (np.array([0, 1e300]), "NaN"),
        (np.array([0, 12000.0]), "reach 1.2e.04"),
        (np.array([-200.5], np.float32), "reach 200.5; expected sound in"),
    ],
)
def test_refuses_bad_waves(engine, wave, expected):
    for ask in (engine.predict, engine.score, engine.embed, engine.infer_recording):
        with pytest.raises(AudioError, match=expected):
            ask(wave, SAMPLE_RATE)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"threshold": -float("inf")}, "threshold is -inf"),
        ({"threshold": 1.5}, "threshold is 1.5, and no s.* score is above 1"),
        ({"threshold": 50}, "threshold is 50"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"overlap": 0.1}, "overlap is 0.1"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"overlap": float("nan")}, "overlap is nan"),
    ],
)
def test_refuses_bad_options(engine, offline, wave, options, expected):
    asks = [lambda: engine.predict(wave, SAMPLE_RATE, **options)]
    if "overlap" in options:
        asks.append(lambda: engine.embed(wave, SAMPLE_RATE, **options))
    else:
        asks.append(lambda: offline.classify(np.zeros((1, DIM), np.float32), **options))
    for ask in asks:
        with pytest.raises(InputError, match=expected):
            ask()


def test_probe_by_name(tmp_path, engine, offline, audio_bundle, wave):
    assert engine.predict(wave, SAMPLE_RATE, probe="linear") == engine.predict(wave, SAMPLE_RATE)
    for ask in (
        lambda: engine.predict(wave, SAMPLE_RATE, probe="mlp"),
        lambda: offline.classify(np.zeros((1, DIM), np.float32), probe="mlp"),
        lambda: engine.probe(""),
    ):
        with pytest.raises(NotFoundError, match=r"no probe '(mlp)?' in bundle tiny.*; it has linear"):
            ask()
    probes = [{**PROBE, **HEAD, "name": "random", "trained": False}]
    with open_bundle(copy_bundle(audio_bundle, tmp_path / "b", probes=probes)) as other:
        prediction = other.predict(wave, SAMPLE_RATE)
        assert (prediction.probe, prediction.trained) == ("random", False)


def test_numbers_of_any_kind_become_json(engine, wave):
    expected = as_json(engine.predict(wave, SAMPLE_RATE))
    for overlap in (0, np.float32(0), np.float64(0)):
        answer = engine.predict(wave, SAMPLE_RATE, overlap=overlap)
        assert as_json(answer) == msgspec.json.decode(msgspec.json.encode(known(answer))) == expected
        assert type(answer.overlap) is float


def test_embedding_document(engine, wave):
    embedded = engine.embed(wave, SAMPLE_RATE, overlap=0.05)
    document = asdict(pipeline.embed(engine, lambda channel: in_memory(wave), Query(overlap=0.05)))
    assert document == {
        "bundle": "tiny",
        "version": "1",
        "output": "embedding",
        "duration": 0.73,
        "window": 0.1,
        "overlap": 0.05,
        "warnings": (),
        "spans": [tuple(span) for span in embedded.spans.tolist()],
        "embeddings": embedded.embeddings.tolist(),
    }


def test_classify(offline, embedding_bundle):
    embeddings = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    scores = scores_of(embeddings @ weights(embedding_bundle)[0], "softmax")
    answer = offline.classify(embeddings, threshold=0.2, top_k=2)
    expected = [[i for i in np.argsort(-row)[:2] if row[i] >= 0.2] for row in scores]
    assert [[each.label for each in row] for row in answer.results] == [[LABELS[i] for i in row] for row in expected]
    np.testing.assert_allclose(
        [each.score for row in answer.results for each in row],
        [scores[n, i] for n, row in enumerate(expected) for i in row],
        **CLOSE,
    )
    assert (answer.bundle, answer.probe, answer.score_scale) == ("tiny-offline", "linear", "softmax")
    assert [len(row) for row in offline.classify(embeddings).results] == (scores >= 0.5).sum(axis=1).tolist()


def test_infer_is_the_graph(engine, offline, oracle, embedding_bundle):
    random = np.random.default_rng(0)
    batch = random.normal(size=(5, WINDOW)).astype(np.float32)
    _, embeddings, logits = oracle(batch.ravel())
    outputs = engine.infer(batch)
    np.testing.assert_allclose(outputs["embedding"], embeddings, **CLOSE)
    np.testing.assert_allclose(outputs["logits"], logits, **CLOSE)
    for row, logit in zip(batch, outputs["logits"], strict=True):
        np.testing.assert_array_equal(engine.infer(row[None])["logits"][0], logit)
    embeddings = random.normal(size=(3, DIM)).astype(np.float32)
    outputs = offline.infer(embeddings)
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], embeddings @ weights(embedding_bundle)[0], **CLOSE)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (np.zeros(DIM, np.float32), r"shape \[4\]; expected \[-1, 4\]"),
        (np.zeros((), np.float32), r"shape \[\]"),
        (np.zeros((1, DIM + 1), np.float32), r"shape \[1, 5\]"),
        (np.zeros((1, 1, DIM), np.float32), r"shape \[1, 1, 4\]"),
        (np.zeros((0, DIM), np.float32), "is empty"),
        (np.zeros((1, DIM), np.float64), "type float64"),
        (np.zeros((1, DIM), np.int32), "type int32"),
        (np.zeros((1, DIM), ">f4"), "type >f4"),
        (np.full((1, DIM), np.nan, np.float32), "NaN"),
        (np.full((1, DIM), np.inf, np.float32), "NaN"),
    ],
)
def test_refuses_bad_tensors(offline, batch, expected):
    for ask in (offline.infer, offline.classify):
        with pytest.raises(TensorError, match=rf"input 'embedding' .*{expected}"):
            ask(batch)


def test_each_kind_answers_its_own_questions(engine, offline, wave):
    for ask in (offline.predict, offline.score, offline.embed, offline.infer_recording):
        with pytest.raises(UnsupportedError, match="takes embeddings, not audio"):
            ask(wave, SAMPLE_RATE)
    with pytest.raises(UnsupportedError, match="takes audio, not embeddings"):
        engine.classify(np.zeros((1, DIM), np.float32))


def test_threads_get_the_same_answers(engine):
    waves = [np.random.default_rng(seed).normal(size=3000 + 700 * seed).astype(np.float32) for seed in range(8)]
    alone = [engine.predict(wave, SAMPLE_RATE, threshold=0.0) for wave in waves]
    gate = threading.Barrier(8)

    def ask(wave):
        gate.wait(10)
        return [engine.predict(wave, SAMPLE_RATE, threshold=0.0) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for answers, expected in zip(pool.map(ask, waves), alone, strict=True):
            assert answers == [expected] * 10


@pytest.mark.parametrize("top_k", [None, 700])
def test_many_ties_stay_in_their_order(top_k):
    scores = np.tile(np.array([0.9, 0.7, 0.9], np.float32), 500)
    best = Selection.of("sigmoid", 0.5, top_k).best(scores)
    assert best == [*np.flatnonzero(scores == scores[0]), *np.flatnonzero(scores == scores[1])][:top_k]


class CountingBackend:
    """Batches of four; the sum of each window; fails when it is told to."""

    device, format, max_batch = "cpu", "onnx", 4

    def __init__(self):
        self.sizes = []
        self.error = None

    def run(self, batch):
        self.sizes.append(len(batch))
        if self.error:
            raise self.error
        total = batch.sum(axis=1, keepdims=True)
        return {"logits": np.repeat(total, len(LABELS), axis=1), "embedding": np.repeat(total, DIM, axis=1)}


def test_batches_follow_the_backend_and_keep_their_order(audio_bundle):
    backend = CountingBackend()
    with Engine(read_bundle(audio_bundle), backend) as engine:
        wave = np.repeat(np.arange(10, dtype=np.float32), WINDOW)
        expected = np.arange(10) * WINDOW
        np.testing.assert_array_equal(engine.embed(wave, SAMPLE_RATE).embeddings[:, 0], expected)
        assert sorted(backend.sizes) == [2, 4, 4]
        np.testing.assert_array_equal(engine.infer(wave.reshape(10, WINDOW))["logits"][:, 0], expected)
        assert sorted(backend.sizes[3:]) == [2, 4, 4]
        # What goes wrong in a thread reaches the caller, and the engine goes on.
        backend.error = ArithmeticError("broken")
        with pytest.raises(ArithmeticError, match="broken"):
            engine.score(wave, SAMPLE_RATE)
        backend.error = None
        assert len(engine.score(wave, SAMPLE_RATE).scores) == 10


class WaitingBackend(CountingBackend):
    """Runs until it may end, and counts how many run at once."""

    def __init__(self):
        super().__init__()
        self.running, self.most = 0, 0
        self.lock, self.began, self.end = threading.Lock(), threading.Event(), threading.Event()

    def run(self, batch):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.began.set()
        assert self.end.wait(20)
        with self.lock:
            self.running -= 1
        return super().run(batch)


def test_callers_of_single_batches_share_the_threads_and_closing_waits_for_them(audio_bundle):
    backend = WaitingBackend()
    engine = Engine(read_bundle(audio_bundle), backend, threads=2)
    one, many = np.ones((1, WINDOW), np.float32), np.ones((20, WINDOW), np.float32)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(engine.infer, batch) for batch in (one, one, many, one, many)]
        assert backend.began.wait(20)
        threading.Timer(0.2, backend.end.set).start()
        assert [len(answer.result(20)["logits"]) for answer in answers] == [1, 1, 20, 1, 20]
        assert backend.most <= 2
        backend.began.clear()
        backend.end.clear()
        last = pool.submit(engine.infer, one)
        assert backend.began.wait(20)
        closing = pool.submit(engine.close)
        with pytest.raises(TimeoutError):
            closing.result(0.3)
        backend.end.set()
        closing.result(20)
        assert len(last.result(20)["logits"]) == 1
        with pytest.raises(RuntimeError, match="is closed"):
            engine.infer(one)


def test_closing_frees_the_threads(audio_bundle, wave):
    before = threading.active_count()
    with open_bundle(audio_bundle) as engine:
        engine.predict(wave, SAMPLE_RATE)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_labels_of_the_bundle_name_the_scores(tmp_path, audio_bundle, wave):
    bundle = copy_bundle(audio_bundle, tmp_path / "b")
    replace_file(bundle, "labels.json", '{"夜鶯": 2, "b": 0, "a": 1}'.encode())
    with open_bundle(bundle) as renamed, open_bundle(audio_bundle) as engine:
        assert renamed.labels() == ("b", "a", "夜鶯")
        names = dict(zip(LABELS, renamed.labels(), strict=True))
        assert [d.label for d in renamed.predict(wave, SAMPLE_RATE).detections] == [
            names[d.label] for d in engine.predict(wave, SAMPLE_RATE).detections
        ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_long_recording_needs_little_more_memory_than_its_wave(tmp_path, audio_bundle):
    script = r"""
        import re, sys
        from pathlib import Path
        import numpy as np, soundfile
        from avex_serve import open_bundle
        from avex_serve.audio.reader import decode

        def peak():
            # Not getrusage: its peak is also the parent's from before the exec.
            return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

        bundle, path = sys.argv[1:]
        wave = np.full(20 * 60 * 16000, 2**-15, np.float32)
        soundfile.write(path, wave, 16000, "PCM_16")
        with open_bundle(bundle, "cpu") as engine:
            engine.score(wave[:1600], 16000)
            start = peak()
            scores = engine.score(wave, 16000).scores
            assert scores.shape == (12000, 3)
            scored = peak()
        del wave
        assert (decode(path).wave == 2**-15).all()
        print((scored - start) / (4 * 20 * 60 * 16000), (peak() - start) / (4 * 20 * 60 * 16000))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(audio_bundle), str(tmp_path / "long.wav")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    scoring, decoding = map(float, result.stdout.split())
    # Besides the wave: the check that it is finite, one byte a sample, and a few windows at a time.
    assert scoring < 0.6
    # Its blocks and the whole, beyond the wave that was there before.
    assert decoding < 1.6
