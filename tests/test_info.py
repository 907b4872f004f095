"""`avex-serve info` and `avex-serve diff`: what a receiver wants to know of a bundle."""

import json

from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main
from avex_serve.service.settings import DEMO_BUNDLE
from tests.bundles import LABELS, calibrated_copy, calibration, make_audio_bundle, make_embedding_bundle


def test_what_a_bundle_is(capsys):
    bundle = read_bundle(DEMO_BUNDLE)
    assert main(["info", str(DEMO_BUNDLE)]) == 0
    out = capsys.readouterr().out
    for part in (bundle.digest, "16000 Hz", "windows of 2 s", "sigmoid scores", "10 labels", "MIT"):
        assert part in out
    assert all(label in out for label in bundle.labels["linear_last"])
    assert all(name in out for name in bundle.manifest.files)

    assert main(["info", str(DEMO_BUNDLE), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["digest"] == bundle.digest
    assert document["files"] == bundle.manifest.files
    assert document["labels"] == {"linear_last": list(bundle.labels["linear_last"])}


def test_an_embedding_bundle_and_an_untrained_head(tmp_path, capsys):
    assert main(["info", str(make_embedding_bundle(tmp_path / "offline"))]) == 0
    assert "takes       embeddings of shape" in capsys.readouterr().out
    assert main(["info", str(make_audio_bundle(tmp_path / "untrained", trained=False))]) == 0
    assert "NOT TRAINED" in capsys.readouterr().out


def test_a_calibrated_head(tmp_path, capsys):
    source = make_audio_bundle(tmp_path / "source")
    calibrated = calibrated_copy(source, tmp_path / "calibrated", linear=calibration())
    assert main(["info", str(calibrated)]) == 0
    assert f"calibrated  {calibration().describe()}\n" in capsys.readouterr().out


def test_what_changed(tmp_path, capsys):
    old = make_audio_bundle(tmp_path / "old")
    new = make_audio_bundle(tmp_path / "new", labels=(*LABELS[:2], "новый"), activation="softmax")
    assert main(["diff", str(old), str(old)]) == 0
    assert capsys.readouterr().out == "the same bundle\n"
    assert main(["diff", str(old), str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert 'probes.linear.activation: "sigmoid" → "softmax"' in lines
    assert (
        f'labels.linear: {json.dumps(LABELS, ensure_ascii=False)} → ["{LABELS[0]}", "{LABELS[1]}", "новый"]' in lines
    )
    assert any(line.startswith("files.labels.json: ") for line in lines)


def test_what_is_no_bundle(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 3
    assert main(["diff", str(DEMO_BUNDLE), str(tmp_path)]) == 3
    assert "Traceback" not in capsys.readouterr().err
