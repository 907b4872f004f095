"""A bundle's evidence run again: on tiny graphs, with their answers computed by numpy in float64."""

import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soxr

from avex_serve.bundles.manifest import EVIDENCE, MANIFEST, ONNX, TORCHSCRIPT, VERIFICATION
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main
from avex_serve.errors import BundleError, TensorError
from avex_serve.evidence.cases import Case, read_evidence, this_machine
from avex_serve.evidence.verify import verify_bundle
from tests.bundles import SAMPLE_RATE, WINDOW, make_audio_bundle, replace_file, weights, with_evidence

AVEX_SERVE = Path(sys.executable).with_name("avex-serve")
SILENCE = np.zeros((1, WINDOW), np.float32)


def sixteen_bit(shape, seed):
    return (np.random.default_rng(seed).integers(-3000, 3000, shape) / 32768).astype(np.float32)


@pytest.fixture(scope="module")
def answer(audio_bundle):
    """Clips (K, WINDOW) → what the tiny graph answers, in float64."""
    to_embedding, to_logits = (matrix.astype(np.float64) for matrix in weights(audio_bundle))

    def compute(clips):
        embedding = clips.astype(np.float64) @ to_embedding
        return {"logits": embedding @ to_logits, "embedding": embedding}

    return compute


@pytest.fixture(scope="module")
def case(answer):
    """Build a case of clips, or of a recording if it has a sample rate; what it answers may be off."""

    def build(name, samples, rate=None, batches=(1,), eager_off=0.0, exact_off=0.0, exact=True):
        spans = None
        clips = samples
        if rate is not None:
            wave = samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE, "HQ")
            count = -(-len(wave) // WINDOW)
            clips = np.concatenate([wave, np.zeros(count * WINDOW - len(wave))]).reshape(count, WINDOW)
            spans = np.array([[i * WINDOW, min((i + 1) * WINDOW, len(wave))] for i in range(count)]) / SAMPLE_RATE
        truth = answer(clips)
        eager = {name: (value + eager_off).astype(np.float32) for name, value in truth.items()}
        truth = {name: value + exact_off for name, value in truth.items()}
        return Case(name, samples, rate, () if rate else batches, spans, eager, truth if exact else None)

    return build


@pytest.fixture
def bundle(tmp_path, audio_bundle):
    """A bundle of this test alone, without evidence."""
    return shutil.copytree(audio_bundle, tmp_path / "bundle")


@pytest.fixture
def all_cases(case):
    """Clips and recordings of every length."""
    return [
        case("noise", sixteen_bit((3, WINDOW), 1), batches=(1, 3, 7)),
        case("silence", SILENCE),
        case("short", sixteen_bit(WINDOW // 2, 2), SAMPLE_RATE),
        case("exact", sixteen_bit(WINDOW, 3), SAMPLE_RATE),
        case("long", sixteen_bit(round(2.4 * WINDOW), 4), SAMPLE_RATE),
        case("another rate", sixteen_bit(6000, 5), 44100),
    ]


def row(report, name):
    """The row of an input: its name, rows and format first, its mark last."""
    (line,) = (line for line in report.splitlines() if line.endswith(f"  {name}"))
    format_, rows, *others, found = re.split(r" {2,}", line.strip())
    return [found, rows, format_, *others]


verify_all = partial(verify_bundle, full=True)


def test_the_worst_rows_are_shown_by_default(bundle, all_cases, case):
    name = "a recording with a name as long as recorders make them, 2024-05-01T04:30:00+0200.wav"
    report, passed = verify_bundle(with_evidence(bundle, *all_cases))
    shown, every = ([line for line in text.splitlines() if "✓" in line] for text in (report, verify_all(bundle)[0]))
    assert (passed, len(shown), len(every)) == (True, 2, 8)
    assert set(shown) < set(every)
    assert "6 others passed with smaller errors; `avex-serve verify BUNDLE --full` shows them" in report
    tiny = case(name, sixteen_bit(WINDOW, 1)[None])
    wrong = [
        replace(tiny, name=f"{name} {i}", eager={k: v + 1 for k, v in tiny.eager.items()}, exact=None)
        for i in range(3)
    ]
    report, passed = verify_bundle(with_evidence(bundle, tiny, *wrong))
    assert not passed
    assert [line.rpartition("  ")[2] for line in report.splitlines() if "✗" in line] == [each.name for each in wrong]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_what_a_bundle_answers_is_what_its_evidence_says(tmp_path, all_cases, activation):
    bundle = with_evidence(make_audio_bundle(tmp_path / "b", activation=activation), *all_cases)
    report, passed = verify_all(bundle)
    assert passed, report
    assert (report.count("✓"), report.count("✗"), report.count("≈")) == (8, 0, 0)
    for name, windows in (("short", "1"), ("exact", "1"), ("long", "3"), ("another rate", "2")):
        assert row(report, name)[1:3] == [windows, "onnx"]
    head = report[: report.index("recordings, end to end")]
    assert ("logits error" in head, "scores error" in head, "scores error" in report) == (True, False, True)


def test_reading_gives_what_was_written(bundle, all_cases):
    record, cases = read_evidence(read_bundle(with_evidence(bundle, *all_cases)))
    assert record.machine == this_machine()
    for found, expected in zip(cases, all_cases, strict=True):
        for name in ("name", "sample_rate", "batches"):
            assert getattr(found, name) == getattr(expected, name)
        for name in ("input", "spans"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        for outputs, wanted in ((found.eager, expected.eager), (found.exact, expected.exact)):
            assert {n: v.dtype for n, v in outputs.items()} == {n: v.dtype for n, v in wanted.items()}
            for name, value in wanted.items():
                np.testing.assert_array_equal(outputs[name], value)


def test_samples_that_no_16_bit_file_holds_stay_as_they_are(bundle, case):
    odd = case("odd", np.full((1, WINDOW), 1.5, np.float32)), case("fine", SILENCE + np.float32(1e-5))
    _, cases = read_evidence(read_bundle(with_evidence(bundle, *odd)))
    for found, expected in zip(cases, odd, strict=True):
        np.testing.assert_array_equal(found.input, expected.input)


def test_the_command_runs_it_without_torch(bundle, all_cases, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    command = [AVEX_SERVE, "verify", with_evidence(bundle, *all_cases), "--full"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("✓") == 8
    for title in ("exported on: ", "verified on: "):
        assert title + this_machine().cpu in result.stdout
    assert result.stdout.count(f"numpy {np.__version__}") == 2


def test_another_graph_is_found_out(bundle, tmp_path, all_cases, capsys):
    with_evidence(bundle, *all_cases)
    other = Path(make_audio_bundle(tmp_path / "other"), ONNX).read_bytes()
    assert main(["verify", str(replace_file(bundle, ONNX, other))]) == 0  # the same weights
    matrix = weights(bundle)[1]
    changed = other.replace(matrix.tobytes(), (matrix + np.float32(1e-3)).tobytes())
    assert changed != other
    capsys.readouterr()
    assert main(["verify", str(replace_file(bundle, ONNX, changed))]) == 5
    output = capsys.readouterr()
    assert "✗" in output.out
    assert "differs from its evidence" in output.err


@pytest.mark.parametrize(
    ("offs", "mark"),
    [
        # The error that passes is 1e-4; here the truth is what the graph answers.
        ({"eager_off": 0.9e-4}, "✓"),
        ({"eager_off": 1.2e-4, "exact": False}, "✗"),
        # The module itself is further off, and the graph is not.
        ({"eager_off": 1e-2}, "≈"),
        ({"eager_off": 1e-2, "exact": False}, "✗"),
        # The graph is 3.9 times and 4.1 times as far from the truth as the module, on the other side.
        ({"exact_off": 3.9e-2, "eager_off": 4.9e-2}, "≈"),
        ({"exact_off": 4.1e-2, "eager_off": 5.1e-2}, "✗"),
        # The module is near the truth, and the graph no further than 1e-4 from it, or further.
        ({"exact_off": 0.9e-4, "eager_off": 1.3e-4}, "≈"),
        ({"exact_off": 1.5e-4, "eager_off": 1.8e-4}, "✗"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rate", [None, SAMPLE_RATE])
def test_float64_judges_where_float32_is_the_noise(bundle, case, offs, mark, rate):
    clip = sixteen_bit((1, WINDOW), 6) / 64
    sample = case("clip", clip if rate is None else clip[0], rate, **offs)
    # Near 0 a score is a quarter as far off as its logit: the embedding decides.
    report, passed = verify_all(with_evidence(bundle, sample))
    assert (row(report, "clip")[-1], passed) == (mark, mark != "✗"), report
    assert ("≈: passed by its error against float64" in report) == (mark == "≈")


def test_a_close_call_is_shown_with_its_margin(bundle, case):
    clip = case("clip", sixteen_bit((1, WINDOW), 7))
    logits = clip.eager["logits"]
    order = np.argsort(-logits[0])
    swapped = logits.copy()
    swapped[0, order[:2]] = logits[0, order[1::-1]]
    apart = replace(clip, name="apart", eager={**clip.eager, "logits": swapped}, exact=None)
    report, passed = verify_all(with_evidence(bundle, clip, apart))
    assert not passed
    margin = float(np.ptp(logits[0, order[:2]]))
    assert row(report, "clip")[-2:] == ["as eager", "✓"]
    assert row(report, "apart")[-2:] == [f"1 other ({margin:.0e})", "✗"]
    # 16-bit samples this small move a logit by less than 1e-4.
    tiny = case("tiny", sixteen_bit((1, WINDOW), 8) / 2**20, eager_off=0)
    answers = {**tiny.eager, "logits": -tiny.eager["logits"]}
    report, passed = verify_all(with_evidence(bundle, replace(tiny, eager=answers, exact=None)))
    assert passed
    assert "1 other (" in row(report, "tiny")[-2]
    assert "rows with other decisions" in report


@pytest.mark.parametrize("change", ["spans", "windows", "padding", "order"])
def test_the_way_of_a_recording_is_compared_too(bundle, case, answer, change):
    long = case("long", sixteen_bit(round(2.4 * WINDOW), 9), SAMPLE_RATE)
    if change == "spans":
        other = replace(long, spans=long.spans + 1 / SAMPLE_RATE)
    elif change == "windows":
        both = ({n: v[:2] for n, v in outputs.items()} for outputs in (long.eager, long.exact))
        other = replace(long, **dict(zip(("eager", "exact"), both, strict=True)), spans=long.spans[:2])
    elif change == "padding":
        wave = np.resize(long.input, 3 * WINDOW)  # goes on where silence belongs
        truth = answer(wave.reshape(3, WINDOW))
        other = replace(long, eager={n: v.astype(np.float32) for n, v in truth.items()}, exact=truth)
    else:
        other = replace(long, eager={n: v[::-1] for n, v in long.eager.items()}, exact=None)
    assert verify_all(with_evidence(bundle, long))[1]
    report, passed = verify_all(with_evidence(bundle, other))
    assert not passed
    assert row(report, "long")[-1] == "✗"


def test_an_answer_that_is_not_finite_does_not_pass(bundle, case):
    huge = case("huge", np.full((1, WINDOW), 3e38, np.float32), exact=False)
    zeros = {name: np.zeros_like(value) for name, value in huge.eager.items()}
    wave = replace(huge, name="wave", input=huge.input[0], sample_rate=SAMPLE_RATE, spans=np.array([[0, 0.1]]))
    report, passed = verify_all(with_evidence(bundle, replace(huge, eager=zeros), replace(wave, eager=zeros)))
    assert not passed
    for name in ("huge", "wave"):
        assert row(report, name)[-1] == "✗"


def test_embeddings_are_verified_as_well(tmp_path, embedding_bundle):
    bundle = shutil.copytree(embedding_bundle, tmp_path / "bundle")
    batch = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    logits = batch.astype(np.float64) @ weights(bundle)[0]
    case = Case("noise", batch, None, (1, 3), None, {"logits": logits.astype(np.float32)}, {"logits": logits})
    report, passed = verify_all(with_evidence(bundle, case))
    assert passed
    assert "recordings" not in report


def test_bundles_from_before_there_was_evidence(bundle, capsys):
    assert main(["verify", str(bundle)]) == 3
    assert f"holds no {VERIFICATION}, which its verification needs" in capsys.readouterr().err
    replace_file(bundle, VERIFICATION, b'{"tolerance": 0.0001, "passed": true, "checks": [], "skipped": []}')
    read_bundle(bundle)
    assert main(["verify", str(bundle)]) == 3
    assert f"holds no {EVIDENCE}, which its verification needs: it was made before" in capsys.readouterr().err


def rewritten(bundle, change):
    """The bundle with a changed record of its evidence, and digests that agree."""
    record = json.loads((bundle / VERIFICATION).read_bytes())
    change(record)
    return replace_file(bundle, VERIFICATION, json.dumps(record).encode())


DAMAGES = {
    "no case": lambda record: record.update(cases=[]),
    "no batch": lambda record: record["cases"][0].update(batches=[]),
    "empty batch": lambda record: record["cases"][0].update(batches=[0]),
    "no rate": lambda record: record["cases"][-1].update(sample_rate=0),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_evidence_that_proves_nothing(bundle, all_cases, damage, capsys):
    rewritten(with_evidence(bundle, *all_cases), damage)
    assert main(["verify", str(bundle)]) == 3
    assert "export again" in capsys.readouterr().err


def test_evidence_nested_too_deeply(bundle, all_cases, capsys):
    replace_file(with_evidence(bundle, *all_cases), VERIFICATION, b"[" * 100_000)
    assert main(["verify", str(bundle)]) == 3
    assert "export again" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["rows", "text", "nothing heard"])
def test_answers_that_fit_no_input(bundle, case, change, capsys):
    odd = case("odd", sixteen_bit((3, WINDOW), 1), batches=(3,))
    if change == "rows":
        odd = replace(odd, eager={name: value[:2] for name, value in odd.eager.items()})
    elif change == "text":
        odd = replace(odd, eager={name: value.astype("U9") for name, value in odd.eager.items()})
    else:
        odd = case("odd", sixteen_bit(WINDOW, 3), SAMPLE_RATE)
        eager, exact = ({n: v[:0] for n, v in outputs.items()} for outputs in (odd.eager, odd.exact))
        odd = replace(odd, eager=eager, exact=exact, spans=odd.spans[:0])
    with_evidence(bundle, odd)
    assert main(["verify", str(bundle)]) == 3
    assert "holds no numbers for each of" in capsys.readouterr().err


def test_a_changed_byte_in_the_evidence(bundle, all_cases, capsys):
    with_evidence(bundle, *all_cases)
    content = bytearray((bundle / EVIDENCE).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / EVIDENCE).write_bytes(content)
    assert main(["verify", str(bundle)]) == 3
    assert "was changed after the export" in capsys.readouterr().err


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip",
        archive(),
        archive(**{"0/input": np.zeros(3), "0/eager/logits": np.array([None, {}])}),
        pickle.dumps({"0/input": 1}),
        None,
    ],
    ids=["empty", "no zip", "no arrays", "objects", "a pickle", "cut"],
)
def test_damaged_evidence_with_the_right_digest(bundle, case, content):
    with_evidence(bundle, case("silence", SILENCE))
    half = (bundle / EVIDENCE).read_bytes()
    replace_file(bundle, EVIDENCE, half[: len(half) // 2] if content is None else content)
    with pytest.raises(BundleError, match="can't be read"):
        verify_bundle(bundle)


def test_evidence_whose_compression_is_damaged(bundle, case):
    with_evidence(bundle, case("silence", SILENCE))
    content = bytearray((bundle / EVIDENCE).read_bytes())
    first = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
    content[first] |= 6  # the type of its first block, which is none that there is
    replace_file(bundle, EVIDENCE, bytes(content))
    with pytest.raises(BundleError, match="can't be read"):
        verify_bundle(bundle)


def test_evidence_that_grows_when_it_is_unpacked(bundle, case, monkeypatch):
    """A small file may hold gigabytes of zeros."""
    with_evidence(bundle, case("silence", SILENCE))
    monkeypatch.setattr("avex_serve.evidence.cases.MAX_BYTES", 10**6)
    file = io.BytesIO()
    np.savez_compressed(file, **{"0/input": np.zeros(10**6)})
    assert file.tell() < 10**4
    replace_file(bundle, EVIDENCE, file.getvalue())
    with pytest.raises(BundleError, match="would take 8000128 bytes of memory; expected at most 1000000"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"no json", "can't be read"),
        (b"[]", "evidence version None"),
        (b'{"evidence_version": 2}', "evidence version 2, this avex-serve reads 1"),
        (b'{"evidence_version": 1}', "can't be read"),
        (b"\xff", "can't be read"),
    ],
)
def test_another_record_with_the_right_digest(bundle, case, document, message):
    with_evidence(bundle, case("silence", SILENCE))
    replace_file(bundle, VERIFICATION, document)
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


def test_evidence_of_another_bundle(bundle, case):
    silence = case("silence", SILENCE)
    wrong = replace(silence, eager={"logits": silence.eager["logits"]})
    with pytest.raises(BundleError, match="has outputs"):
        verify_all(with_evidence(bundle, wrong))
    with pytest.raises(TensorError, match="expected"):
        verify_all(with_evidence(bundle, replace(silence, input=SILENCE[:, 1:])))


def test_torchscript_alone_needs_torch(bundle, case, monkeypatch, capsys):
    with_evidence(bundle, case("silence", SILENCE))
    replace_file(bundle, ONNX, None)
    replace_file(bundle, TORCHSCRIPT, b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "avex_serve.inference.torch", raising=False)
    assert main(["verify", str(bundle)]) == 3
    assert "needs torch, which is not installed" in capsys.readouterr().err


def test_a_machine_is_told_without_saying_whose_it_is():
    machine = this_machine()
    assert machine.versions["numpy"] == np.__version__
    assert {"python", "avex-serve", "onnxruntime"} <= machine.versions.keys()
    text = msgspec.json.encode(machine).decode()
    assert not {str(Path.home()), Path.home().name, __import__("platform").node()} & set(re.split(r'[",: ]', text))
    assert (machine.cpu in machine.lines(), MANIFEST in text) == (True, False)
