"""Bundles with several heads, and with none."""

import numpy as np
import pytest

from avex_serve import open_bundle
from avex_serve.errors import NotFoundError, UnsupportedError
from avex_serve.inference.scores import activate
from tests.bundles import DIM, LABELS, NOISES, SAMPLE_RATE, make_backbone_bundle, make_probes_bundle, weights


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    with open_bundle(make_probes_bundle(tmp_path_factory.mktemp("bundles") / "probes")) as engine:
        yield engine


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    with open_bundle(make_backbone_bundle(tmp_path_factory.mktemp("bundles") / "backbone")) as engine:
        yield engine


def test_each_head_answers_by_its_own_labels_and_scale(probes, wave):
    birds = probes.predict(wave, SAMPLE_RATE, top_k=5)
    noise = probes.predict(wave, SAMPLE_RATE, top_k=5, probe="noise")
    assert (birds.probe, birds.score_scale) == ("birds", "sigmoid")
    assert (noise.probe, noise.score_scale) == ("noise", "softmax")
    assert {d.label for d in birds.detections} == set(probes.labels()) == set(LABELS)
    assert {d.label for d in noise.detections} == set(probes.labels("noise")) == set(NOISES)
    _, to_birds, to_noise = weights(probes.bundle.directory)
    embeddings = probes.embed(wave, SAMPLE_RATE).embeddings
    for name, matrix, activation in (("birds", to_birds, "sigmoid"), ("noise", to_noise, "softmax")):
        scores = probes.score(wave, SAMPLE_RATE, probe=name).scores
        np.testing.assert_allclose(scores, activate(embeddings @ matrix, activation), rtol=1e-5)


def test_all_heads_are_asked_in_one_pass(probes, wave, monkeypatch):
    options = {"threshold": 0.3, "overlap": 0.02}
    alone = [probes.predict(wave, SAMPLE_RATE, **options, probe=name) for name in ("birds", "noise")]
    rows = []
    run = probes.backend.run
    monkeypatch.setattr(probes.backend, "run", lambda batch: rows.append(len(batch)) or run(batch))
    together = probes.predict_all(wave, SAMPLE_RATE, **options)
    assert together == alone
    assert sum(rows) == len(probes.embed(wave, SAMPLE_RATE, overlap=0.02).spans)


def test_unknown_heads_and_embeddings(probes, offline, wave):
    with pytest.raises(NotFoundError, match="no probe 'frogs' in bundle tiny-probes; it has birds, noise"):
        probes.predict(wave, SAMPLE_RATE, probe="frogs")
    with pytest.raises(NotFoundError, match=r"no embedding 'birds\.logits' in bundle tiny-probes; it has embedding"):
        probes.embed(wave, SAMPLE_RATE, output="birds.logits")
    with pytest.raises(UnsupportedError, match="takes embeddings, not audio"):
        offline.embed(wave, SAMPLE_RATE)


def test_a_backbone_without_heads_answers_embeddings_alone(backbone, wave):
    spans, embeddings = backbone.embed(wave, SAMPLE_RATE)
    assert embeddings.shape == (len(spans), DIM)
    assert list(backbone.infer_recording(wave, SAMPLE_RATE)) == ["embedding"]
    for ask in (backbone.predict, backbone.predict_all, backbone.score):
        with pytest.raises(
            UnsupportedError, match="tiny-embeddings has no probe and returns only embeddings; use embed"
        ):
            ask(wave, SAMPLE_RATE)
