"""The servers that are asked, each started once, and the situations in which one can be put."""

import contextlib
import os
import re
import socket
import time

from tests import bundles
from tests.service.conftest import running_server

from .sounds import silence

PATIENCE = 60  # seconds until a recording that hangs fails
KEYS = ("first-key.of_two", "2nd+key/with=")
HOST = "avex.test"  # what requests call the server, whatever port it has

MAX_BODY = 60_000
# Nothing that an answer depends on is left to the machine.
FIXED = {
    "AVEX_DEVICE": "cpu",
    "AVEX_PRECISION": "float32",
    "AVEX_THREADS": "1",
    "AVEX_RELOAD_SECONDS": "0",
    "OMP_NUM_THREADS": "1",
}
LIMITS = {
    "AVEX_CONCURRENCY": "1",
    "AVEX_QUEUE": "0",
    "AVEX_READ_TIMEOUT_SECONDS": "2",
    "AVEX_MAX_BODY_BYTES": str(MAX_BODY),
    "AVEX_MAX_HELD_BYTES": str(MAX_BODY + 1000),
    "AVEX_MAX_JSON_BYTES": "20000",
    "AVEX_MAX_SECONDS": "60",
    "AVEX_MAX_CLIP_SECONDS": "0.2",
    "AVEX_MAX_STEPS": "5",
    "AVEX_MAX_DECODED_BYTES": "4000000",
    "AVEX_MAX_CHANNELS": "2",
    "AVEX_MAX_WINDOWS": "600",
    "AVEX_MAX_ANSWER_BYTES": "40000",
}


def _audio(folder):
    return bundles.make_audio_bundle(folder / "bundle")


def _embedding(folder):
    return bundles.make_embedding_bundle(folder / "bundle")


def _keys(folder):
    (folder / "keys").write_text(f"{KEYS[1]}\n")
    return _audio(folder)


def _limits(folder):
    shelf = folder / "limits"
    bundles.make_audio_bundle(shelf / "tiny")
    bundles.make_slow_bundle(shelf / "slow")
    bundles.make_sequence_bundle(shelf / "sequence", "sequence")
    bundles.make_measuring_bundle(shelf / "clips", "clips", shortest=600)
    return shelf


def _explicit(folder):
    shelf = folder / "explicit"
    bundles.make_audio_bundle(shelf / "tiny")
    bundles.make_audio_bundle(shelf / "random", name="random", activation="softmax", trained=False)
    _broken(shelf)
    return shelf


def _shelf(folder):
    """Every kind of bundle, several versions of one, and one that is broken."""
    shelf = folder / "shelf"
    for version in ("9", "10"):
        bundles.change_manifest(bundles.make_audio_bundle(shelf / "tiny" / version), version=version)
    bundles.make_audio_bundle(shelf / "random", name="random", activation="softmax", trained=False)
    bundles.make_audio_bundle(shelf / "plain", name="plain", activation="none")
    bundles.make_probes_bundle(shelf / "probes", name="probes")
    bundles.make_backbone_bundle(shelf / "backbone", name="backbone")
    bundles.make_measuring_bundle(shelf / "masked", name="masked")
    bundles.make_measuring_bundle(shelf / "clips", name="clips", shortest=600)
    bundles.make_sequence_bundle(shelf / "sequence", name="sequence")
    bundles.make_embedding_bundle(shelf / "offline", name="offline")
    bundles.make_embedding_bundle(shelf / "linked", name="linked", reads=bundles.FINGERPRINT)
    newer = bundles.make_embedding_bundle(shelf / "linked2", name="linked", reads=bundles.FINGERPRINT)
    bundles.change_manifest(newer, version="2")
    bundles.make_embedding_bundle(shelf / "stranger", name="stranger", reads="f" * 64)
    _broken(shelf)
    return shelf


def _broken(shelf):
    bundle = bundles.make_audio_bundle(shelf / "broken", name="broken")
    path = bundle / bundles.ONNX
    path.write_bytes(path.read_bytes() + b"changed")


# name: what makes its bundles in a folder, and what is set
SERVERS = {
    "audio": (_audio, {}),
    "shelf": (_shelf, {}),
    "embedding": (_embedding, {}),
    "keys": (_keys, {"AVEX_API_KEYS": f"{KEYS[0]},"}),
    "limits": (_limits, LIMITS),
    "explicit": (_explicit, {"AVEX_MODEL_CONTROL": "explicit"}),
}


@contextlib.contextmanager
def serving(name, folder):
    """The server of that name, with its files in the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    make, variables = SERVERS[name]
    variables = {**FIXED, **variables, "AVEX_BUNDLE": str(make(folder))}
    if name == "keys":
        variables["AVEX_API_KEYS_FILE"] = str(folder / "keys")
    with running_server(folder / "server", **variables) as server:
        yield server


def normalised(text, server, folder):
    """The text without what is another one at each run: ports, folders and the versions of the package."""
    for found, name in (
        (str(folder), "FOLDER"),
        (os.path.realpath(folder), "FOLDER"),
        (f"127.0.0.1:{server.http_port}", "127.0.0.1:HTTP_PORT"),
        (f"127.0.0.1:{server.grpc_port}", "127.0.0.1:GRPC_PORT"),
        (f"{HOST}:{server.grpc_port}", f"{HOST}:GRPC_PORT"),
        (f'"grpc_port":{server.grpc_port}', '"grpc_port":"GRPC_PORT"'),
    ):
        text = text.replace(found, name)
    text = re.sub(r'("name":\s*"avex-serve",\s*"version":\s*")[^"]*"', r'\1VERSION"', text)
    text = re.sub(r"(<h1>avex-serve )[^<]*", r"\1VERSION", text)
    return re.sub(r"\b[0-9a-f]{64}\b", "DIGEST", text)


# Situations


@contextlib.contextmanager
def situation(name, server):
    """Put the server in that situation for the length of the block."""
    with _SITUATIONS[name](server):
        yield


@contextlib.contextmanager
def _calm(_):
    yield


LONG = silence(58)  # many seconds of work for the slow bundle


@contextlib.contextmanager
def _busy(server):
    """The only slot is taken by a recording that takes long."""

    def is_full():  # asked by a request that takes no slot itself
        return server.client.post("/nothing").status_code == 503

    head = f"POST /predict?model=slow HTTP/1.1\r\nHost: a\r\nContent-Length: {len(LONG)}\r\n\r\n"
    with _connection(server) as connection:
        connection.sendall(head.encode() + LONG)
        _until(is_full)
        yield
    _until(lambda: not is_full())


@contextlib.contextmanager
def _held(server):
    """A client uploads half of the largest body and pauses."""
    head = f"POST /predict?model=tiny HTTP/1.1\r\nHost: a\r\nContent-Length: {MAX_BODY}\r\n\r\n".encode()

    def refused():
        with _connection(server) as other:
            other.sendall(head)
            other.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                return other.recv(1000).startswith(b"HTTP/1.1 503 ")

    with _connection(server) as connection:
        connection.sendall(head + bytes(MAX_BODY // 2))
        _until(refused)
        yield
    _until(lambda: not refused())


_SITUATIONS = {"": _calm, "busy": _busy, "held": _held}


def _connection(server):
    return socket.create_connection(("127.0.0.1", server.http_port), timeout=PATIENCE)


def _until(found):
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)
