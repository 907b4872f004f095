"""Calibrated bundles: probabilities, and what is selected by default, as the engine and the command answer."""

import json

import numpy as np
import pytest
import soundfile

from avex_serve.cli import main
from avex_serve.errors import InputError, NotFoundError
from avex_serve.inference.backend import open_bundle
from tests.bundles import (
    DIM,
    LABELS,
    NOISES,
    SAMPLE_RATE,
    SCALES,
    calibrated_copy,
    calibration,
    make_audio_bundle,
    make_embedding_bundle,
    make_probes_bundle,
)

SLOPES, OFFSETS = np.array([(np.nan, np.nan) if each is None else each[:2] for each in SCALES]).T


@pytest.fixture(scope="module")
def wave():
    return np.random.default_rng(0).uniform(-1, 1, 20 * 1600).astype(np.float32)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The same bundle without and with a calibration."""
    folder = tmp_path_factory.mktemp("bundles")
    plain = make_audio_bundle(folder / "plain")
    return plain, calibrated_copy(plain, folder / "calibrated")


@pytest.fixture(scope="module")
def engines(paths):
    with open_bundle(paths[0], "cpu") as plain, open_bundle(paths[1], "cpu") as calibrated:
        yield plain, calibrated


def probability(logit):
    return 1 / (1 + np.exp(-(SLOPES * logit + OFFSETS)))


def by_place(prediction):
    return {(each.start, each.label): each for each in prediction.detections}


def test_probabilities_are_the_logistic_of_the_logit(engines, wave):
    logits = engines[0].infer_recording(wave, SAMPLE_RATE)["logits"].astype(np.float64)
    before, after = (by_place(engine.predict(wave, SAMPLE_RATE, threshold=0)) for engine in engines)
    assert before.keys() == after.keys()
    assert len(after) == logits.size
    for (start, label), each in after.items():
        row, column = round(start * SAMPLE_RATE / 1600), LABELS.index(label)
        assert each.score == before[start, label].score
        assert before[start, label].probability is None
        if column == 2:
            assert each.probability is None
        else:
            assert each.probability == pytest.approx(probability(logits[row])[column], abs=1e-6)


def test_the_default_is_the_threshold_of_each_label(engines, wave):
    plain, calibrated = engines
    logits = plain.infer_recording(wave, SAMPLE_RATE)["logits"]
    for options, lowest in (
        ({}, (0.3, 0, 0)),
        ({"threshold": 0.6}, 3 * [np.log(0.6 / 0.4)]),
        ({"threshold": {"robin": 0.6}}, (0.3, np.log(0.6 / 0.4), 0)),
        ({"threshold": {}}, (0.3, 0, 0)),
        ({"top_k": 3}, 3 * [-np.inf]),
        ({"top_k": 3, "threshold": {"robin": 0.5}}, (-np.inf, 0, -np.inf)),
    ):
        found = calibrated.predict(wave, SAMPLE_RATE, **options).detections
        expected = {(int(i), LABELS[j]) for i, j in np.argwhere(logits >= lowest)}
        assert {(round(each.start * SAMPLE_RATE / 1600), each.label) for each in found} == expected
        assert 0 < len(found) == len(expected)
    assert len(plain.predict(wave, SAMPLE_RATE).detections) == (logits >= 0).sum()
    mapped = plain.predict(wave, SAMPLE_RATE, threshold={"robin": 0.6}).detections
    assert len(mapped) == (logits >= (0, np.log(0.6 / 0.4), 0)).sum()


def test_thresholds_by_label_are_checked(engines, wave):
    for engine in engines:
        with pytest.raises(NotFoundError, match="no probe has the label 'robbin'; did you mean 'robin'"):
            engine.predict(wave, SAMPLE_RATE, threshold={"robbin": 0.5})
        with pytest.raises(InputError, match="threshold of 'robin' is 1\\.5, and no sigmoid score"):
            engine.predict(wave, SAMPLE_RATE, threshold={"robin": 1.5})
        with pytest.raises(InputError, match="threshold of 'robin' is nan"):
            engine.predict(wave, SAMPLE_RATE, threshold={"robin": float("nan")})
        (warning,) = engine.predict(wave, SAMPLE_RATE, threshold={"robin": -1}).warnings
        assert "'robin' is -1" in warning


def test_heads_have_their_own(tmp_path, wave):
    source = make_probes_bundle(tmp_path / "a")
    bundle = calibrated_copy(source, tmp_path / "b", noise=calibration(NOISES, ((1.0, 0.0, 0.9), (1.0, 0.0, 0.2))))
    with open_bundle(source, "cpu") as plain, open_bundle(bundle, "cpu") as engine:
        birds, noise = engine.predict_all(wave, SAMPLE_RATE)
        assert birds.detections == plain.predict_all(wave, SAMPLE_RATE)[0].detections
        assert all(each.probability is None for each in birds.detections)
        scores = plain.score(wave, SAMPLE_RATE, probe="noise").scores
        lowest = 1 / (1 + np.exp(-np.array([0.9, 0.2])))
        assert len(noise.detections) == (scores >= lowest).sum() > 0
        for each in noise.detections:  # slope 1 and offset 0: the probability is the softmax score
            assert each.probability == pytest.approx(each.score, abs=1e-6)
        # A threshold is for the heads that have its label.
        birds, noise = engine.predict_all(wave, SAMPLE_RATE, threshold={"wind": 0.0, "robin": 1.0})
        assert sum(each.label == "wind" for each in noise.detections) == len(scores)
        assert not any(each.label == "robin" and each.score < 1 for each in birds.detections)
        with pytest.raises(NotFoundError, match="'owl'"):
            engine.predict_all(wave, SAMPLE_RATE, threshold={"owl": 0.5})


def test_embeddings_are_classified_with_probabilities(tmp_path):
    bundle = calibrated_copy(make_embedding_bundle(tmp_path / "a"), tmp_path / "b")
    embeddings = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    with open_bundle(bundle, "cpu") as engine:
        rows = engine.classify(embeddings, threshold=0).results
    for row in rows:
        for each in row:
            odds = np.log(each.score / (1 - each.score))
            expected = probability(odds)[LABELS.index(each.label)]
            assert each.probability == (None if np.isnan(expected) else pytest.approx(expected, abs=1e-5))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_extreme_scores_have_probabilities(tmp_path, activation):
    """Scores that float32 rounds to 0 and 1 too."""
    source = make_audio_bundle(tmp_path / "a", activation=activation)
    with open_bundle(calibrated_copy(source, tmp_path / "b"), "cpu") as engine:
        calibrator = engine.calibrator()
        scores = np.array([[0, 1, 1], [1, 0, 0], [1e-30, 1 - 6e-8, 0.5]], np.float32)
        found = calibrator.probabilities(scores)
    assert np.isfinite(found[:, :2]).all()
    assert ((found[:, :2] >= 0) & (found[:, :2] <= 1)).all()
    assert np.isnan(found[:, 2]).all()


def test_the_command_answers_as_the_engine(paths, engines, wave, tmp_path, capsys):
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, SAMPLE_RATE, subtype="FLOAT")
    (tmp_path / "limits.csv").write_text("label,threshold\nrobin,0.6\n")

    def ask(bundle, *options):
        capsys.readouterr()
        assert main(["predict", str(bundle), str(path), *map(str, options)]) == 0
        return capsys.readouterr().out

    for options, same in (((), {}), (("--threshold", tmp_path / "limits.csv"), {"threshold": {"robin": 0.6}})):
        answer = json.loads(ask(paths[1], "--json", *options))
        expected = engines[1].predict(wave, SAMPLE_RATE, **same).detections
        assert len(answer["detections"]) == len(expected)
        for each, known in zip(answer["detections"], expected, strict=True):
            assert each.get("probability", None) == known.probability
            assert ("probability" in each) == (known.label != LABELS[2])
            assert (each["score"], each["label"]) == (known.score, known.label)
    assert "probability" not in ask(paths[0], "--json")
    first = engines[1].predict(wave, SAMPLE_RATE).detections[0]
    columns, _, row, *_ = ask(paths[1]).splitlines()
    assert columns == "start (s), end (s), sigmoid score, calibrated probability, label"
    line = row.split()
    assert line[2:] == [
        f"{first.score:.3f}",
        "–" if first.probability is None else f"{first.probability:.0%}",
        first.label,
    ]
    columns, _, row, *_ = ask(paths[0]).splitlines()
    assert columns == "start (s), end (s), sigmoid score, label"
    assert row.split()[2:] != line[2:]
