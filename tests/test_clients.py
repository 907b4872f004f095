"""Every example of docs/clients.md runs, against a service that serves a bundle of that name."""

import base64
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

from avex_serve.audio.reader import decode, open_audio
from avex_serve.inference import pipeline
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.pipeline import Query
from avex_serve.service.grpc.messages import SERVICE, message_class
from tests.answers import as_json
from tests.bundles import LABELS, make_audio_bundle
from tests.service.conftest import encode, running_server

PAGE = (Path(__file__).parents[1] / "docs" / "clients.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_audio_bundle(tmp_path_factory.mktemp("clients") / "bundle", name="my_probe")


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    with running_server(tmp_path_factory.mktemp("clients") / "server", AVEX_BUNDLE=str(bundle)) as server:
        yield server


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a recording."""
    (tmp_path / "recording.wav").write_bytes(encode(2.5, 44100, 2, "WAV"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def engine(bundle):
    with open_bundle(bundle) as engine:
        yield engine


def localised(code, server):
    code = code.replace("overlap=1", "overlap=0.05")  # the tiny model's window is shorter
    return code.replace("localhost:3000", server.http).replace("localhost:3001", server.grpc)


def shell(code, server):
    command = ["bash", "-euo", "pipefail", "-c", localised(code, server)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def python(code, server):
    names = {}
    exec(compile(localised(code, server), "docs/clients.md", "exec"), names)
    return names


def test_curl(server, workplace, engine):
    answers = [json.loads(each) for each in re.findall(r"\{.*?\}(?=\{\"bundle\"|$)", shell(SHELL[0], server))]
    recording = decode("recording.wav")
    expected = [
        engine.predict(*recording, top_k=1),
        engine.predict(*recording, threshold=0.3, overlap=0.05),
        pipeline.embed(engine, partial(open_audio, Path("recording.wav")), Query()),
    ]
    assert answers == [as_json(each) for each in expected]


def test_curl_with_the_options_of_a_run(server, workplace, engine):
    expected = engine.predict(*decode("recording.wav"), label=["robin", "chiffchaff"], overlap=0.05, merge=0)
    assert json.loads(shell(SHELL[1], server)) == as_json(expected)


def test_lines(server, workplace, engine):
    lines = [json.loads(line) for line in shell(SHELL[2], server).splitlines()]
    assert lines == python(PYTHON[0], server)["events"]
    detections = [one for line in lines[1:-1] for one in line["detections"]]
    assert detections == as_json(engine.predict(*decode("recording.wav")))["detections"]


def test_tables(server, workplace, engine):
    shell(SHELL[3], server)
    count = len(engine.predict(*decode("recording.wav")).detections)
    assert count > 0
    names = ("recording.selections.txt", "labels.txt", "detections.csv")
    assert [Path(name).read_text().count("\n") for name in names] == [count + 1, count, count + 1]


def test_curl_with_an_id(server, workplace, engine):
    headers = shell(SHELL[4], server)
    assert "x-request-id: dawn-7" in headers
    expected = as_json(engine.predict(*decode("recording.wav")))
    assert json.loads(Path("answer.json").read_text()) == expected


def test_curl_with_the_protocol(server, workplace, engine):
    (scores,) = json.loads(shell(SHELL[5], server))["outputs"]
    expected = engine.score(*decode("recording.wav")).scores
    np.testing.assert_allclose(np.reshape(scores["data"], scores["shape"]), expected, rtol=1e-6)


def test_curl_of_a_description(server):
    described = json.loads(shell(SHELL[6], server))
    assert [probe["labels"] for probe in described["probes"]] == [list(LABELS)]


def test_curl_with_thresholds(server, workplace, engine):
    answers = [json.loads(each) for each in re.findall(r"\{.*?\}(?=\{\"bundle\"|$)", shell(SHELL[7], server))]
    recording = decode("recording.wav")
    expected = [engine.predict(*recording, threshold=each) for each in (0.3, {"robin": 0.7})]
    assert answers == [as_json(each) for each in expected]


def test_grpc_by_reflection(server, workplace, engine):
    names = python(PYTHON[7], server)
    assert names["labels"] == list(LABELS)
    assert names["detections"] == as_json(engine.predict(*decode("recording.wav")))["detections"] != []


def test_grpcurl_sends_what_the_methods_take(server, workplace):
    """The messages of the examples, parsed as grpcurl parses them; the tool itself is not installed here."""
    calls = re.findall(r"-d '(\{.*?\})' localhost:3001 inference.GRPCInferenceService/(\w+)", PAGE)
    template, method = re.search(r"printf '(\{.*\})' .*/(\w+)\n", PAGE).groups()
    audio = base64.b64encode(Path("recording.wav").read_bytes()).decode()
    with grpc.insecure_channel(server.grpc) as channel:
        for text, name in [*calls, (template.replace("%s", audio), method)]:
            request = json_format.Parse(text, message_class(f"{name}Request")())
            call = channel.unary_unary(
                f"/{SERVICE}/{name}", type(request).SerializeToString, message_class(f"{name}Response").FromString
            )
            answer = call(request)
    assert answer.outputs[0].shape == [25, 1]
    place = re.search(r'`python -c "(.*?)"`', PAGE)[1]
    assert Path(subprocess.check_output([sys.executable, "-c", place], text=True).strip()).is_file()


def test_bentoml(server, workplace, engine, capsys):
    names = python(PYTHON[1], server)
    names["client"]._temp_dir.cleanup()  # which closing forgets
    assert names["prediction"] == as_json(engine.predict(*decode("recording.wav"), top_k=1))
    assert len(capsys.readouterr().out.splitlines()) == len(names["prediction"]["detections"])


@pytest.mark.parametrize("code", [PYTHON[2], PYTHON[5], PYTHON[6]], ids=["grpc", "stream", "http"])
def test_triton(server, workplace, engine, code, capsys):
    names = python(code, server)
    np.testing.assert_array_equal(names["scores"], engine.score(*decode("recording.wav")).scores)
    if code == PYTHON[2]:
        assert names["labels"] == list(LABELS)
        assert len(capsys.readouterr().out.splitlines()) == len(names["scores"]) == len(names["spans"])


def test_triton_with_windows(server, engine):
    names = python(PYTHON[3], server)
    np.testing.assert_array_equal(names["embeddings"], engine.infer(names["windows"])["embedding"])


def test_triton_with_detections(server, workplace, engine):
    expected = engine.predict(*decode("recording.wav"), threshold=0.3, merge=0)
    assert python(PYTHON[4], server)["detections"] == as_json(expected)["detections"]


def test_no_example_is_left_out():
    assert (len(SHELL), len(PYTHON)) == (8, 8)
