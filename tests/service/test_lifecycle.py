"""Starting and stopping as a user does."""

import os
import shutil
import signal
import socket
import subprocess
import tomllib
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc
import yaml

from avex_serve.bundles.manifest import ONNX
from tests.bundles import make_audio_bundle, replace_file
from tests.service.conftest import BENTOML, free_ports, running_server, serve_command, server_environment

SERVICE = "avex_serve.service:AvexService"
CHECKOUT = Path(__file__).parents[2]


def test_log_says_what_is_served_and_how_to_serve_another(audio_server, audio_bundle):
    line = next(line for line in audio_server.log.splitlines() if "serving bundle" in line)
    assert f"serving bundle tiny, version 1, from {audio_bundle} on cpu (onnx)" in line
    line = next(line for line in audio_server.log.splitlines() if "gRPC listens on" in line)
    assert audio_server.grpc in line
    assert "AVEX_BUNDLE=dir" in line
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


def refused_start(folder, http_port=None, **variables):
    """What the command prints when it refuses to start."""
    free_port, grpc_port = free_ports(2)
    environment = server_environment(
        folder / "home", **{"AVEX_GRPC_HOST": "127.0.0.1", "AVEX_GRPC_PORT": str(grpc_port), **variables}
    )
    done = subprocess.run(
        serve_command(http_port or free_port, SERVICE),
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


@pytest.mark.parametrize("listed", [True, False], ids=["no graph", "a changed file"])
def test_a_bundle_that_only_the_worker_can_refuse(tmp_path, audio_bundle, listed):
    """The check before the start reads no large file. The worker reports the reason in one line."""
    bundle = shutil.copytree(audio_bundle, tmp_path / "bundle")
    if listed:
        replace_file(bundle, ONNX, b"no graph")
    else:
        (bundle / ONNX).write_bytes(b"no graph")
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
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "can't start" in line:
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    reason = (
        "onnxruntime can't load" if listed else f"{bundle / ONNX} was changed after the export (its sha256 differs)"
    )
    assert reason in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_bentofile_lists_the_dependencies():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    bentofile = yaml.safe_load((CHECKOUT / "bentofile.yaml").read_text())
    assert bentofile["python"]["packages"] == project["dependencies"]
