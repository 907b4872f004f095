"""The `avex-serve` command, run as users run it; the engine in this process is the oracle."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

import avex_serve
from avex_serve import open_bundle
from avex_serve.audio.reader import decode
from avex_serve.cli import main
from avex_serve.errors import quoted
from tests.answers import as_json, program
from tests.bundles import LABELS, make_audio_bundle

AVEX_SERVE = Path(sys.executable).with_name("avex-serve")


def run(*arguments, **environment):
    return subprocess.run(
        [AVEX_SERVE, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def write(path, seconds, rate, channels):
    samples = np.random.default_rng(rate).uniform(-1, 1, (int(seconds * rate), channels))
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Recordings of two kinds."""
    folder = tmp_path_factory.mktemp("audio")
    return [write(folder / "dawn.wav", 0.42, 44100, 2), write(folder / "abends spät.flac", 0.31, 16000, 1)]


@pytest.fixture(scope="module")
def ask(audio_bundle):
    """The oracle: path and options → the engine's document."""
    with open_bundle(audio_bundle) as engine:
        yield lambda path, **options: engine.predict(*decode(path), **options)


COLUMNS = "start (s), end (s), sigmoid score, label"


def test_onnxruntime_reports_nothing(audio_bundle, files, tmp_path):
    """Where it does, it keeps an id of the machine in HOME, and complains where it can't."""
    result = run("predict", audio_bundle, files[0], HOME=str(tmp_path), XDG_CACHE_HOME="")
    assert (result.returncode, result.stderr) == (0, "")
    assert list(tmp_path.rglob("*")) == []


def test_a_table_for_each_file(audio_bundle, files, ask):
    result = run("predict", audio_bundle, *files)
    assert (result.returncode, result.stderr) == (0, "")
    lines = iter(result.stdout.splitlines())
    assert next(lines) == COLUMNS
    for path, seconds in zip(files, ("0.4", "0.3"), strict=True):
        detections = ask(path).detections
        assert detections
        assert next(lines) == f"{quoted(path)}: {seconds} s, {len(detections)} detections"
        for detection in detections:
            start, end, score, label = next(lines).split()
            assert (float(start), float(end)) == (round(detection.start, 2), round(detection.end, 2))
            assert float(score) == pytest.approx(detection.score, abs=0.00051)
            assert label == detection.label
    assert not list(lines)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.6},
        {"threshold": -1.0, "top_k": 2},
        {"top_k": 1, "overlap": 0.05},
        {"probe": "linear", "threshold": 0.0},
        {"hop": 0.03, "merge": 0.0, "merge_score": "mean"},
        {"label": ["robin", "chiffchaff"], "top_k": 1},
    ],
    ids=str,
)
def test_json_is_the_engines_document(audio_bundle, files, ask, options):
    listed = [(name, each) for name, each in options.items() if name != "label"]
    listed += [("label", each) for each in options.get("label", ())]
    given = [f"--{name.replace('_', '-')}={value}" for name, value in listed]
    result = run("predict", audio_bundle, *files, "--json", *given, "--device", "cpu")
    # A warning about an option is no warning about each file.
    warnings = [f"avex-serve: {warning}" for warning in ask(files[0], **options).warnings]
    assert (result.returncode, result.stderr.splitlines()) == (0, warnings)
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert documents == [{"file": str(path), **as_json(ask(path, **options))} for path in files]


def test_no_detections(audio_bundle, files):
    result = run("predict", audio_bundle, files[0], "--threshold", "1")
    assert (result.returncode, result.stdout) == (0, f"{COLUMNS}\n{files[0]}: 0.4 s, 0 detections\n")


@pytest.mark.parametrize(
    ("activation", "score"), [("sigmoid", "sigmoid score"), ("softmax", "softmax score"), ("none", "raw logit")]
)
def test_the_scale_of_the_scores_is_named(tmp_path, files, capsys, activation, score):
    bundle = make_audio_bundle(tmp_path / "bundle", activation=activation)
    assert main(["predict", str(bundle), *map(str, files)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"start (s), end (s), {score}, label"


def test_a_bad_file_keeps_none_from_being_answered(tmp_path, audio_bundle, files, ask):
    bad, missing, empty = tmp_path / "bad.wav", tmp_path / "missing.wav", tmp_path / "empty"
    bad.write_text("this is no audio")
    empty.mkdir()
    given = [files[0], bad, missing, empty, files[1]]
    result = run("predict", audio_bundle, *given, "--json")
    assert result.returncode == 2
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [document["file"] for document in documents] == [str(path) for path in given]
    assert [documents[0], documents[4]] == [{"file": str(path), **as_json(ask(path))} for path in files]
    messages = result.stderr.splitlines()
    assert messages == [f"avex-serve: {document['error']}" for document in documents[1:4]]
    for message, path in zip(messages, (bad, missing, empty), strict=True):
        assert str(path) in message


def test_every_fault_of_a_recording_names_it(tmp_path, audio_bundle):
    soundfile.write(tmp_path / "48 Hz.wav", np.zeros(9600), 48)
    soundfile.write(tmp_path / "blip.wav", np.zeros(1), 192000)
    (tmp_path / "a: page.mp3").write_text("<html>")
    (tmp_path / "program.mp3").write_bytes(program())
    result = run("predict", audio_bundle, tmp_path)
    messages = result.stderr.splitlines()
    assert (result.returncode, result.stdout, len(messages)) == (2, "", 4)
    names = ("'48 Hz.wav'", "'a: page.mp3'", "blip.wav", "program.mp3")
    for message, name in zip(messages, names, strict=True):
        quote = "'" if name.startswith("'") else ""
        assert message.startswith(f"avex-serve: {quote}{tmp_path}/{name.lstrip(quote)}")


@pytest.mark.parametrize(
    "option", ["--overlap=3", "--top-k=0", "--threshold=nan", "--probe=x", "--hide=x", "--show=x"]
)
def test_a_bad_option_is_reported_once_before_any_recording_is_opened(tmp_path, audio_bundle, files, option):
    result = run("predict", audio_bundle, tmp_path / "missing.wav", *files, option, "--json")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "missing" not in result.stderr


def test_folders_patterns_and_lists(tmp_path, audio_bundle, ask):
    odd = [tmp_path / "a: 1.wav", tmp_path / "[b] 'c'.flac", tmp_path / "deep" / "d.ogg"]
    odd[2].parent.mkdir()
    for number, path in enumerate(odd, 1):
        write(path, 0.1 * number, 16000, 1)
    (tmp_path / "._a: 1.wav").write_bytes(b"of a Mac")
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in odd))
    for given in ([tmp_path], [f"{tmp_path}/**/*.*a*", f"{tmp_path}/*", odd[2]], [f"@{tmp_path}/list.txt"]):
        result = run("predict", audio_bundle, *given, "--json")
        assert result.returncode == 0
        documents = {document["file"]: document for document in map(json.loads, result.stdout.splitlines())}
        assert documents == {str(path): {"file": str(path), **as_json(ask(path))} for path in odd}
    result = run("predict", audio_bundle, tmp_path, "--top-k=1")
    hidden = f"avex-serve: 1 hidden file was left out, e.g. '{tmp_path}/._a: 1.wav'\n"
    assert (result.returncode, result.stderr) == (0, hidden)
    names = [shlex.split(line)[0].removesuffix(":") for line in result.stdout.splitlines()[1:] if line[0] != " "]
    assert sorted(names) == sorted(map(str, odd))


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "pipe"])
def test_a_pipe_is_read(tmp_path, audio_bundle, files, ask, name):
    given, data, expected = name, files[1].read_bytes(), as_json(ask(files[1]))
    if name == "pipe":
        given = tmp_path / name
        os.mkfifo(given)
        threading.Thread(target=given.write_bytes, args=(data,)).start()
    command = [AVEX_SERVE, "predict", audio_bundle, given, "--json"]
    result = subprocess.run(command, input=data, capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert json.loads(result.stdout) == {"file": str(given), **expected}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("-", "standard input is empty"),
        ("/dev/zero", "/dev/zero is a device, not a recording"),
        ("https://example.org/a.wav", "https://example.org/a.wav is not on this machine; download it"),
    ],
)
def test_what_is_no_recording_is_refused_by_name(audio_bundle, name, expected):
    command = [AVEX_SERVE, "predict", audio_bundle, name]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"avex-serve: {expected}")


def test_standard_input_has_its_name_in_the_table_and_in_warnings(audio_bundle, files):
    cut = files[0].read_bytes()[:20_000]
    result = subprocess.run([AVEX_SERVE, "predict", audio_bundle, "-"], input=cut, capture_output=True, timeout=60)
    assert result.stdout.splitlines()[1].startswith(b"standard input: 0.1 s")
    assert result.stderr.startswith(b"avex-serve: standard input: the recording ends early")


def test_the_name_of_a_recording_that_is_a_part_of_the_message(tmp_path, audio_bundle, files):
    """A file called 1, of which the message says that its channels are 1 to 2."""
    (tmp_path / "1").write_bytes(files[0].read_bytes())
    result = subprocess.run(
        [AVEX_SERVE, "predict", audio_bundle, "1", "--channel=9"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr.startswith("avex-serve: 1: channel is 9; expected 1 to 2")


@pytest.mark.parametrize("channel", ["left", "0", "-1", "1.5"])
def test_a_channel_that_is_none(audio_bundle, files, channel):
    result = run("predict", audio_bundle, files[0], f"--channel={channel}")
    assert result.returncode == 2
    assert f"argument --channel: '{channel}' is no channel; expected a number from 1, or mix" in result.stderr


def test_labels_that_are_hidden_are_no_detections(tmp_path, files):
    bundle = make_audio_bundle(tmp_path / "bundle", labels=("Background", "robin", "wren"))
    everything = ["--threshold=-1"]

    def rows(*options):
        lines = run("predict", bundle, files[0], *everything, *options).stdout.splitlines()[1:]
        return lines[0].partition(" s, ")[2], {line.split()[3] for line in lines[1:]}

    assert rows() == ("10 detections, and 5 of hidden labels", {"robin", "wren"})
    assert rows("--show=Background") == ("15 detections", {"Background", "robin", "wren"})
    assert rows("--hide=wren") == ("5 detections, and 10 of hidden labels", {"robin"})
    # A line of JSON is the service's answer but for what is hidden by name.
    document = json.loads(run("predict", bundle, files[0], *everything, "--json", "--hide=wren").stdout)
    assert {each["label"] for each in document["detections"]} == {"Background", "robin"}
    result = run("predict", bundle, files[0], "--hide=Robin")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "avex-serve: the head has no label 'Robin'; did you mean 'robin'?\n"


def test_a_folder_that_is_no_bundle(tmp_path, files):
    for folder in (tmp_path, tmp_path / "nowhere", files[0]):
        result = run("predict", folder, files[0])
        assert (result.returncode, result.stdout) == (3, "")
        assert result.stderr.startswith(f"avex-serve: {folder} ")
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("command", "code"), [("predict", 3), ("run", 2)])
def test_a_probe_in_place_of_its_bundle(tmp_path, files, command, code, monkeypatch, capsys):
    """What fit writes first, and what people try first."""
    (tmp_path / "my probe").mkdir()
    (tmp_path / "my probe" / "probe.yml").write_text("format: 1\n")
    monkeypatch.chdir(tmp_path)
    more = ["--out", "results"] if command == "run" else []
    assert main([command, "my probe", str(files[0]), *more]) == code
    said = capsys.readouterr().err
    assert said.startswith(
        "avex-serve: my probe holds no manifest.json; it is a saved probe: make a bundle of it with "
    )
    assert "avex-export --probe 'my probe'" in said


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr("avex_serve.cli.settings.run", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["settings"]) == 130
    assert capsys.readouterr().err == "avex-serve: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--threshold", "high"], "--threshold"),
        (["--threshold", "nan"], "threshold is nan"),
        (["--threshold", "50"], "threshold is 50"),
        (["--top-k", "0"], "top_k is 0"),
        (["--top-k", "1.5"], "--top-k"),
        (["--overlap", "0.1"], "overlap is 0.1"),
        (["--overlap", "-1"], "overlap is -1.0"),
        (["--probe", "mlp"], "no probe 'mlp'"),
        (["--device", "tpu"], "--device"),
        (["--precision", "int4"], "--precision"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_options(audio_bundle, files, capsys, arguments, expected):
    try:
        code = main(["predict", str(audio_bundle), str(files[0]), *arguments])
    except SystemExit as exited:  # argparse
        code = exited.code
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    assert expected in output.err


@pytest.mark.parametrize(
    "arguments", [[], ["predict"], ["predict", "bundle"], ["hear", "a.wav"], ["predict", "b", "f", "--top-k=x"]]
)
def test_bad_usage(arguments):
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: avex-serve")
    assert "Traceback" not in result.stderr


def test_an_embedding_bundle_names_no_sounds(embedding_bundle, files):
    result = run("predict", embedding_bundle, files[0])
    assert (result.returncode, result.stdout) == (2, "")
    assert "takes embeddings, not audio" in result.stderr


def test_version_and_help():
    for command in ([], *([name] for name in ("predict", "verify", "settings", "demo"))):
        assert run(*command, "--version").stdout == f"{avex_serve.__version__}\n"
    for arguments in (["--help"], ["predict", "--help"]):
        result = run(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert "predict" in result.stdout


def test_names_and_labels_that_the_terminal_cannot_show(tmp_path, audio_bundle, files):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/z\xe4.flac")
    os.rename(write(tmp_path / "z.flac", 0.1, 16000, 1), path)  # noqa: PTH104
    missing = os.fsdecode(os.fsencode(tmp_path) + b"/\xe4.flac")
    result = run("predict", audio_bundle, path, missing, "--top-k=3")
    assert (result.returncode, result.stderr.count("no such file")) == (2, 1)
    assert "z\\udce4.flac': 0.1 s, 3 detections" in result.stdout
    assert LABELS[2] in result.stdout
    result = run("predict", audio_bundle, path, "--top-k=3", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Zaunk\\xf6nig" in result.stdout


def test_a_reader_that_goes_away(audio_bundle, files):
    process = subprocess.Popen(
        [AVEX_SERVE, "predict", audio_bundle, *[files[0]] * 3], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(30) == 1


def test_random_weights_are_told(tmp_path, files, capsys):
    bundle = make_audio_bundle(tmp_path / "bundle", trained=False)
    assert main(["predict", str(bundle), str(files[0])]) == 0
    assert capsys.readouterr().err == "avex-serve: the head has random weights: its answers mean nothing\n"
