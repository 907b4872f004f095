"""Starting and stopping as a user does."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc

from avex_serve.bundles.manifest import ONNX
from tests.bundles import make_audio_bundle, proven, replace_file
from tests.clients import until
from tests.service.conftest import BENTOML, free_ports, running_server, serve_command, server_environment

SERVICE = "avex_serve.service:AvexService"
CHECKOUT = Path(__file__).parents[2]


def test_log_says_what_is_served_and_where(audio_server, audio_bundle):
    line = next(line for line in audio_server.log.splitlines() if "serving bundle" in line)
    assert f"serving bundle tiny, version 1, from {audio_bundle} on cpu (onnx)" in line
    line = next(line for line in audio_server.log.splitlines() if "gRPC listens on" in line)
    assert audio_server.grpc in line
    assert "AVEX_BUNDLE=" not in audio_server.log, "it is set"
    assert "random weights" not in audio_server.log


def test_checkout_without_torch(tmp_path, predict, wav):
    """`bentoml serve` in a checkout, by bentofile.yaml; a bundle with random weights is called that."""
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import sys\nfor name in ('torch', 'onnx', 'onnxscript', 'safetensors'):\n    sys.modules[name] = None\n"
    )
    bundle = make_audio_bundle(tmp_path / "bundle", trained=False)
    with running_server(
        tmp_path / "server", cwd=CHECKOUT, service=(), AVEX_BUNDLE=str(bundle), PYTHONPATH=str(blocker)
    ) as server:
        assert server.post("/predict", content=wav).json() == {**predict(wav), "trained": False}
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            assert client.is_model_ready("tiny")
        assert "random weights" in server.log
    for port in (server.http_port, server.grpc_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def refused_start(folder, *options, http_port=None, **variables):
    """What the command prints when it refuses to start."""
    free_port, grpc_port = free_ports(2)
    environment = server_environment(
        folder / "home", **{"AVEX_GRPC_HOST": "127.0.0.1", "AVEX_GRPC_PORT": str(grpc_port), **variables}
    )
    done = subprocess.run(
        serve_command(http_port or free_port, SERVICE, *options),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def test_bundle_that_is_not_there(tmp_path):
    assert "nowhere is not a folder" in refused_start(tmp_path, AVEX_BUNDLE="nowhere")


def test_port_taken_by_a_server_that_would_share_it(tmp_path, audio_bundle, audio_server):
    """Another server on the gRPC port, which SO_REUSEPORT would let us join."""
    message = refused_start(tmp_path, AVEX_BUNDLE=str(audio_bundle), AVEX_GRPC_PORT=str(audio_server.grpc_port))
    assert f"gRPC can't listen on {audio_server.grpc}: Address already in use" in message
    with grpc.insecure_channel(audio_server.grpc) as channel:
        grpc.channel_ready_future(channel).result(10)


def test_http_port_that_is_taken(tmp_path, audio_bundle, audio_server):
    message = refused_start(tmp_path, http_port=audio_server.http_port, AVEX_BUNDLE=str(audio_bundle))
    assert message == (
        f"avex-serve: HTTP can't listen on {audio_server.http}: Address already in use; stop what listens there, or "
        "choose another --port\n"
    )


def test_http_port_that_is_none(tmp_path, audio_bundle):
    message = refused_start(tmp_path, http_port=80_000, AVEX_BUNDLE=str(audio_bundle))
    assert message == "avex-serve: HTTP can't listen on port 80000; expected 1 to 65535: choose another --port\n"


def test_a_saved_probe_is_no_bundle(tmp_path):
    folder = tmp_path / "my probe"
    shutil.copytree(CHECKOUT / "avex_serve" / "demo" / "probes" / "linear_last", folder)
    message = refused_start(tmp_path, AVEX_BUNDLE=str(folder))
    assert (
        f"holds no manifest.json; it is a saved probe: make a bundle of it with avex-export --probe '{folder}'"
        in message
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AVEX_API_KEY": "s3cret"}, "AVEX_API_KEY is no setting; did you mean AVEX_API_KEYS?"),
        ({"AVEX_DRAIN_SECONDS": "soon"}, "AVEX_DRAIN_SECONDS is 'soon'"),
        ({"AVEX_WORKERS": "2", "AVEX_MODEL_CONTROL": "explicit"}, "AVEX_MODEL_CONTROL is explicit with 2 workers"),
        (
            {"AVEX_MAX_HELD_BYTES": "10MB"},
            "AVEX_MAX_HELD_BYTES is 10000000, less than AVEX_MAX_BODY_BYTES, 134217728",
        ),
        ({"AVEX_MAX_BODY_BYTES": "1500MiB"}, "AVEX_MAX_HELD_BYTES is 1073741824, less than AVEX_MAX_BODY_BYTES"),
    ],
    ids=["no setting", "a bad value", "loading with several workers", "too little for a body", "a body too large"],
)
def test_settings_that_stop_the_start(tmp_path, variables, message):
    (line,) = refused_start(tmp_path, **variables).splitlines()
    assert message in line
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"AVEX_LOG_FORMAT": "json", "AVEX_BUNDLE": "nowhere"}, "nowhere is not a folder"),
     ({"AVEX_LOG_FORMAT": "JSON", "AVEX_GRPC_PORT": "grpc"}, "AVEX_GRPC_PORT is 'grpc'")],
    ids=["a bundle", "a setting"],
)  # fmt: skip
def test_a_refusal_is_json_where_the_log_is(tmp_path, variables, message):
    environment = server_environment(tmp_path / "home", **variables)
    command = serve_command(free_ports(1)[0], SERVICE)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    (line,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert line["level"] == "CRITICAL"
    assert message in line["message"]


def test_no_room_for_temporary_files(tmp_path, audio_bundle):
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, os, tempfile\ndef full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "tempfile.TemporaryFile = full\n"
    )
    message = refused_start(tmp_path, AVEX_BUNDLE=str(audio_bundle), PYTHONPATH=str(tmp_path))
    assert message.startswith("avex-serve: temporary files can't be written: No space left on device; make room")


def test_the_demo_is_served_with_a_warning(tmp_path, wav):
    with running_server(tmp_path) as server:
        assert server.log.count("AVEX_BUNDLE is not set: this is the demo bundle") == 1
        assert server.log.count("; to serve another bundle: AVEX_BUNDLE=dir bentoml serve") == 1
        for path in ("/predict", "/embed"):
            (warning,) = server.post(path, content=wav).json()["warnings"]
            assert "set AVEX_BUNDLE to serve yours" in warning
        assert warning in server.get("/readyz").text
        assert server.get("/").json()["warnings"] == [warning]


def test_an_endpoint_for_traces_without_the_exporter(tmp_path, audio_bundle, wav):
    """Clusters set the variable for all containers: the service starts, and says in one line that it sends none."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.exporter'] = None\n")
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(tmp_path)}
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(audio_bundle), **variables) as server:
        assert server.post("/predict", content=wav).status_code == 200
        lines = [line for line in server.log.splitlines() if "no traces are sent" in line]
        assert len(lines) == 1
        assert "pip install 'avex-serve[tracing]'" in lines[0]


def test_traces_over_grpc_are_not_promised(tmp_path, audio_bundle):
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with running_server(tmp_path, AVEX_BUNDLE=str(audio_bundle), **variables) as server:
        (line,) = [line for line in server.log.splitlines() if "OTLP_PROTOCOL" in line]
        assert "is grpc, but traces are sent by OTLP over HTTP" in line


def test_an_endpoint_for_traces_that_is_no_url(tmp_path, audio_bundle, wav):
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4317"}
    with running_server(tmp_path, AVEX_BUNDLE=str(audio_bundle), **variables) as server:
        assert server.post("/predict", content=wav).status_code == 200
        (line,) = [line for line in server.log.splitlines() if "traces" in line]
        assert "no traces are sent: OTEL_EXPORTER_OTLP_ENDPOINT doesn't begin with http:// or https://" in line


def test_an_empty_folder_may_start(tmp_path, audio_bundle, wav):
    folder = tmp_path / "bundles"
    folder.mkdir()
    variables = {"AVEX_BUNDLE": str(folder), "AVEX_RELOAD_SECONDS": "0.2"}
    assert "holds no manifest.json" in refused_start(tmp_path, **variables)
    with running_server(tmp_path / "server", status=503, AVEX_START_EMPTY="1", **variables) as server:
        assert server.post("/predict", content=wav).status_code == 503
        shutil.copytree(audio_bundle, folder / ".unfinished")
        (folder / ".unfinished").rename(folder / "tiny")
        until(lambda: server.get("/readyz").status_code == 200)
        assert server.post("/predict", content=wav).status_code == 200


def test_a_swap_logs_what_replaced_what(tmp_path, audio_bundle):
    bundle = shutil.copytree(audio_bundle, tmp_path / "bundle")
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(bundle), AVEX_RELOAD_SECONDS="0.2") as server:
        before = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()[:12]
        make_audio_bundle(tmp_path / "new", activation="softmax")
        bundle.rename(tmp_path / "old")
        (tmp_path / "new").rename(bundle)
        after = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()[:12]
        line = until(lambda: [line for line in server.log.splitlines() if "in place of" in line])[0]
        assert f"serving bundle tiny, version 1, from {bundle} on cpu (onnx), digest {after}" in line
        assert line.endswith(f", in place of tiny, version 1, digest {before}")


def test_the_first_answer_of_a_bundle_that_is_swapped_in_is_compared(tmp_path, audio_bundle, wav):
    """Where only a warning is asked for, each answer of the same bundle has it."""
    bundle = proven(shutil.copytree(audio_bundle, tmp_path / "bundle"))
    variables = {"AVEX_BUNDLE": str(bundle), "AVEX_RELOAD_SECONDS": "0.2"}
    with running_server(tmp_path / "server", **variables) as server:
        bad = proven(make_audio_bundle(tmp_path / "bad", activation="softmax"), off=1e-2)
        bundle.rename(tmp_path / "good")
        bad.rename(bundle)
        line = until(lambda: [line for line in server.log.splitlines() if "goes on: on this machine" in line])[0]
        assert "AVEX_CHECK=warn uses it nevertheless" in line
        answer = server.post("/predict", content=wav)
        assert (answer.status_code, answer.json()["score_scale"]) == (200, "sigmoid")
        (state,) = server.post("/v2/repository/index").json()
        assert state["state"] == "READY"
        assert "answers otherwise than its evidence" in state["reason"]
        assert until(lambda: 'avex_bundle_changes_total{change="refused"} 1.0' in server.get("/metrics").text)
    with running_server(tmp_path / "warned", AVEX_CHECK="warn", **variables) as server:
        (warning,) = server.post("/predict", content=wav).json()["warnings"]
        assert warning.startswith("on this machine")
        assert server.log.count(warning) == 1


def test_one_port_for_both(tmp_path, audio_bundle):
    (port,) = free_ports(1)
    message = refused_start(tmp_path, http_port=port, AVEX_BUNDLE=str(audio_bundle), AVEX_GRPC_PORT=str(port))
    assert f"AVEX_GRPC_PORT is {port}, on which HTTP listens" in message
    config = tmp_path / "bentoml.yml"
    config.write_text(f"services:\n  AvexService:\n    http:\n      port: {port}\n")
    done = subprocess.run(
        [str(BENTOML), "serve", SERVICE],
        cwd=tmp_path,
        env=server_environment(
            tmp_path / "home",
            AVEX_BUNDLE=str(audio_bundle),
            AVEX_GRPC_HOST="127.0.0.1",
            AVEX_GRPC_PORT=str(port),
            BENTOML_CONFIG=str(config),
        ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"AVEX_GRPC_PORT is {port}, on which HTTP listens" in done.stderr


@pytest.mark.parametrize("fault", ["no graph", "a changed file", "other answers"])
def test_a_bundle_that_only_the_worker_can_refuse(tmp_path, audio_bundle, fault):
    """The check before the start reads no large file. The worker reports the reason in one line."""
    bundle = shutil.copytree(audio_bundle, tmp_path / "bundle")
    if fault == "no graph":
        replace_file(bundle, ONNX, b"no graph")
        reason = "onnxruntime can't load"
    elif fault == "a changed file":
        (bundle / ONNX).write_bytes(b"no graph")
        reason = f"{bundle / ONNX} was changed after the export (its sha256 differs)"
    else:
        proven(bundle, off=1e-2)
        reason = "on this machine bundle tiny, version 1, answers otherwise than its evidence (onnx on cpu): "
    http_port, grpc_port = free_ports(2)
    process = subprocess.Popen(
        serve_command(http_port, SERVICE),
        cwd=tmp_path,
        env=server_environment(
            tmp_path / "home", AVEX_BUNDLE=str(bundle), AVEX_GRPC_HOST="127.0.0.1", AVEX_GRPC_PORT=str(grpc_port)
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, "it is not started again for ever"
    lines = [line for line in output.splitlines() if "can't start" in line]
    assert len(lines) == 1
    assert reason in lines[0]
    assert "Traceback" not in output
