"""Heads that take embeddings, asked about recordings beside the audio bundles that make them."""

from contextlib import contextmanager

import numpy as np
import pytest

from avex_serve import open_bundle
from avex_serve.errors import InputError, NotFoundError, UnsupportedError
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from avex_serve.inference.repository import Repository
from tests.answers import in_memory
from tests.bundles import SAMPLE_RATE, change_manifest, make_audio_bundle, make_embedding_bundle

READS, OTHER = "a1" * 32, "b2" * 32
WAVE = np.random.default_rng(0).uniform(-0.5, 0.5, 5000).astype(np.float32)


def record(channel):
    return in_memory(WAVE, frames=WAVE.size)


def never(channel):
    raise AssertionError("it was decoded")


def audio_bundle(folder, name="tiny", fingerprint=READS, **changes):
    changes = {"embeddings": [{"output": "embedding", "layers": ["last"], "fingerprint": fingerprint}], **changes}
    return change_manifest(make_audio_bundle(folder, name=name), **changes)


def head_bundle(folder, name="head", reads=READS, **changes):
    return change_manifest(make_embedding_bundle(folder, name=name, reads=reads), **changes)


@contextmanager
def repository(folder):
    """What lies in the folder; with how many batches each model's graph was run on."""
    runs = {}

    def open_counted(path):
        engine = open_bundle(path)
        name, run = engine.manifest.name, engine.backend.run

        def counted(batch):
            runs[name] = runs.get(name, 0) + 1
            return run(batch)

        engine.backend.run = counted
        return engine

    opened = Repository([folder], open_counted)
    runs.clear()  # of warming up
    try:
        yield opened, runs
    finally:
        opened.close()


def expected(folder, head, **options):
    """What the head says of the audio bundle's embeddings: (start, end, label, score) of each detection."""
    overlap = options.pop("overlap", 0.0)
    with open_bundle(folder / "tiny") as audio, open_bundle(folder / head) as reader:
        spans, embeddings = audio.embed(WAVE, SAMPLE_RATE, overlap=overlap)
        rows = reader.classify(embeddings, **options).results
    return [
        (start, end, each.label, each.score)
        for (start, end), row in zip(spans.tolist(), rows, strict=True)
        for each in row
    ]


def detections(prediction):
    return [(each.start, each.end, each.label, each.score) for each in prediction.detections]


@pytest.mark.parametrize("options", [{}, {"top_k": 1, "overlap": 0.03}, {"threshold": 0.2}])
def test_a_head_hears_by_an_audio_bundle(tmp_path, options):
    audio_bundle(tmp_path / "tiny")
    head_bundle(tmp_path / "head")
    with repository(tmp_path) as (opened, runs):
        prediction = pipeline.predict(opened, record, Query(model="head", **options))
        windows = runs["tiny"]
        assert detections(prediction) == expected(tmp_path, "head", **options)
        assert (prediction.bundle, prediction.probe, prediction.score_scale) == ("head", "linear", "softmax")
        own = pipeline.predict(opened, record, Query(model="tiny", **options))
        assert (prediction.duration, prediction.window) == (own.duration, own.window)
        assert runs == {"tiny": 2 * windows, "head": windows}
        with pytest.raises(NotFoundError, match="no probe 'nothing'"):
            pipeline.predict(opened, record, Query(model="head", probe="nothing"))
        with pytest.raises(InputError, match="top_k is 0"):
            pipeline.predict(opened, record, Query(model="head", top_k=0))
        assert runs["tiny"] == 2 * windows


def test_all_heads_in_one_pass_of_the_backbone(tmp_path):
    audio_bundle(tmp_path / "tiny")
    head_bundle(tmp_path / "head")
    head_bundle(tmp_path / "second", name="second")
    head_bundle(tmp_path / "second-2", name="second", reads=OTHER, version="2")
    head_bundle(tmp_path / "stranger", name="stranger", reads=OTHER)
    head_bundle(tmp_path / "unknown", name="unknown", reads=None)
    with repository(tmp_path) as (opened, runs):
        predictions = pipeline.predict_all(opened, record, Query(top_k=2)).predictions
        assert runs == dict.fromkeys(("tiny", "head", "second"), 4)
        assert [(each.bundle, each.version) for each in predictions] == [
            ("tiny", "1"),
            ("head", "1"),
            ("second", "1"),
        ]
        assert predictions[0] == pipeline.predict(opened, record, Query(model="tiny", top_k=2))
        assert predictions[1] == pipeline.predict(opened, record, Query(model="head", top_k=2))
        assert pipeline.predict_all(opened, record, Query(model="tiny", version="1", top_k=2)).predictions == (
            predictions
        )
        with pytest.raises(UnsupportedError, match="bundle head takes embeddings, not audio"):
            pipeline.predict_all(opened, record, Query(model="head"))


def test_a_bundle_without_heads_lends_its_embeddings(tmp_path):
    audio_bundle(tmp_path / "tiny", probes=[])
    with repository(tmp_path) as (opened, _), pytest.raises(UnsupportedError, match="returns only embeddings"):
        pipeline.predict_all(opened, record, Query())
    head_bundle(tmp_path / "head")
    with repository(tmp_path) as (opened, runs):
        predictions = pipeline.predict_all(opened, record, Query()).predictions
        assert [each.bundle for each in predictions] == ["head"]
        assert runs == {"tiny": 4, "head": 4}


@pytest.mark.parametrize(
    ("head", "audio", "reason"),
    [
        ({"reads": OTHER}, {}, f"with the fingerprint {OTHER[:12]} .*: tiny makes {READS[:12]} "),
        ({}, {"fingerprint": None}, f"with the fingerprint {READS[:12]} .*: tiny makes unknown "),
        ({"reads": None}, {}, "does not say which backbone makes the embeddings that its probe linear reads"),
        (
            {},
            {"embeddings": [{"output": "logits", "layers": ["last"], "fingerprint": READS}], "probes": []},
            r"fingerprint a1a1a1a1a1a1 \[-1, 4\]: tiny makes a1a1a1a1a1a1 \[-1, 3\]",
        ),
    ],
)
def test_embeddings_that_do_not_fit(tmp_path, head, audio, reason):
    audio_bundle(tmp_path / "tiny", **audio)
    head_bundle(tmp_path / "head", **head)
    with repository(tmp_path) as (opened, runs):
        with pytest.raises(UnsupportedError, match=f"^bundle head takes embeddings, not audio, .*{reason}"):
            pipeline.predict(opened, record, Query(model="head"))
        assert runs == {}


def test_no_audio_bundle_at_all(tmp_path):
    head_bundle(tmp_path / "head")
    with repository(tmp_path) as (opened, _):
        with pytest.raises(UnsupportedError, match=f"{READS[:12]} .*: there is none; use classify"):
            pipeline.predict(opened, record, Query())
        with pytest.raises(UnsupportedError, match="takes embeddings, not audio"):
            pipeline.predict_all(opened, record, Query())


def test_several_audio_bundles_need_a_name(tmp_path):
    audio_bundle(tmp_path / "tiny")
    audio_bundle(tmp_path / "other", name="other")
    with repository(tmp_path) as (opened, _):
        with pytest.raises(InputError, match="several models are served: 'other', 'tiny'; name one"):
            pipeline.predict_all(opened, record, Query())
        (answer,) = pipeline.predict_all(opened, record, Query(model="other")).predictions
        assert answer.bundle == "other"


def test_nothing_is_decoded_in_vain(tmp_path):
    audio_bundle(tmp_path / "tiny")
    head_bundle(tmp_path / "head")
    head_bundle(tmp_path / "stranger", name="stranger", reads=OTHER)
    with repository(tmp_path) as (opened, _), opened.lease("tiny") as tiny, opened.lease("head") as head:
        for ask, options, error in (
            (pipeline.predict, {"model": "nothing"}, NotFoundError),
            (pipeline.predict, {"model": "tiny", "version": "2"}, NotFoundError),
            (pipeline.predict, {"model": "stranger"}, UnsupportedError),
            (pipeline.predict_all, {"model": "head"}, UnsupportedError),
            (pipeline.embed, {"model": "head"}, UnsupportedError),
            (pipeline.embed, {"model": "tiny", "output": "nothing"}, NotFoundError),
            (pipeline.embed, {"model": "tiny", "overlap": -1}, InputError),
            *(
                (pipeline.predict, {"model": model, **wrong}, error)
                for model in ("tiny", "head")
                for wrong, error in (
                    ({"probe": "nothing"}, NotFoundError),
                    ({"top_k": 0}, InputError),
                    ({"threshold": float("nan")}, InputError),
                    ({"overlap": 1.0}, InputError),
                )
            ),
        ):
            with pytest.raises(error):
                ask(opened, never, Query(**options))
        for engine in (tiny, head):
            with (
                pytest.raises(InputError, match="overlap is -1"),
                pipeline.open_rows(opened, engine, never, Query(overlap=-1)),
            ):
                pass
