"""docs/proxy.md as written: its nginx, in front of a service that it starts, with the certificate that it makes."""

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from avex_serve.service.settings import Settings
from tests.bundles import make_slow_bundle
from tests.clients import SERVICE, rpc, until
from tests.service.conftest import encode, free_ports, running_server

PAGE = (Path(__file__).parents[2] / "docs" / "proxy.md").read_text()
CONFIGURATION = re.search(r"```nginx\n(.*?)```", PAGE, re.DOTALL)[1]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PYTHON = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
LARGEST = 2**18  # of a body
NGINX = shutil.which("nginx", path="/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light")


@dataclass(frozen=True)
class Proxy:
    """nginx, the service behind it, and the folder of both."""

    port: int
    folder: Path
    service: object
    client: httpx.Client
    key: str

    @property
    def log(self):
        return (self.folder / "access.log").read_text()

    def post(self, path, **arguments):
        return self.client.post(path, headers=self.headers(arguments.pop("headers", {})), **arguments)

    def headers(self, more=()):
        return {"Authorization": f"Bearer {self.key}", **dict(more)}

    def shell(self, command):
        return subprocess.run(
            command, shell=True, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )

    @contextlib.contextmanager
    def channel(self):
        trusted = grpc.ssl_channel_credentials((self.folder / "server.pem").read_bytes())
        with grpc.secure_channel(f"localhost:{self.port}", trusted) as channel:
            yield channel


def replaced(text, *pairs):
    """The text with each of these in place of the other, which must be in it once or more."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def trust(folder):
    """Of the certificate that the page makes."""
    return ssl.create_default_context(cafile=folder / "server.pem")


@contextlib.contextmanager
def nginx(folder, port, service):
    """The page's nginx in front of a service, on a free port and as the user of the tests."""
    site = replaced(
        CONFIGURATION,
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("127.0.0.1:3000", service.http),
        ("127.0.0.1:3001", service.grpc),
        ("/etc/nginx/", f"{folder}/"),
        ("/var/log/nginx/avex-serve.log", f"{folder}/access.log"),
    )
    (folder / "site.conf").write_text(site)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"    {kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log stderr;\n"
        f"events {{}}\nhttp {{\n{paths}\n    include {folder}/site.conf;\n}}\n"
    )
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr
    with (folder / "errors.log").open("w") as errors:
        process = subprocess.Popen(command, stderr=errors)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxy")
    make_slow_bundle(folder / "export" / "bundles" / "my_probe", "my_probe")
    (folder / "recording.wav").write_bytes(encode(1, 16000, 1, "WAV"))
    new_key, serve, new_certificate, *_ = COMMANDS
    for command in (new_key, new_certificate):
        subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True, timeout=60)
    *variables, bentoml, verb, service, option, host = serve.split()
    settings = dict(each.split("=") for each in variables)
    assert [bentoml, verb, service] == ["bentoml", "serve", "avex_serve.service:AvexService"]
    assert [option, host, settings.pop("AVEX_GRPC_HOST")] == ["--host", "127.0.0.1", "127.0.0.1"]
    key = (folder / "keys").read_text().strip().split(":")[1]
    (port,) = free_ports(1)
    with (
        running_server(folder / "server", cwd=folder, AVEX_MAX_BODY_BYTES=str(LARGEST), **settings) as server,
        nginx(folder, port, server),
        httpx.Client(base_url=f"https://localhost:{port}", verify=trust(folder), timeout=60) as client,
    ):

        def answers():
            with contextlib.suppress(httpx.TransportError):
                return client.get("/readyz").status_code == 200

        until(answers)
        yield Proxy(port, folder, server, client, key)


def test_the_commands_of_the_page(proxy):
    for command in COMMANDS[3:]:
        done = proxy.shell(replaced(command, ("https://localhost", f"https://localhost:{proxy.port}")))
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "end"
    names = {}
    program = replaced(PYTHON, ("localhost:443", f"localhost:{proxy.port}"))
    with contextlib.chdir(proxy.folder):
        exec(compile(program, "proxy.md", "exec"), names)
    names["client"].close()
    audio = (proxy.folder / "recording.wav").read_bytes()
    direct = proxy.service.post("/predict", content=audio, params={"threshold": 0}, headers=proxy.headers())
    found = {(one["start"], one["label"]): one["score"] for one in direct.json()["detections"]}
    assert names["scores"].size == len(found)
    assert sorted(found.values()) == pytest.approx(np.sort(names["scores"], axis=None).tolist(), abs=1e-6)
    assert proxy.post("/predict", content=audio, params={"threshold": 0}).json() == direct.json()
    assert "<html" in proxy.client.get("/", headers={"Accept": "text/html"}).text


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_lines_come_while_they_are_computed(proxy, version):
    (proxy.folder / "long.wav").write_bytes(encode(6, 16000, 1, "WAV"))
    name = f"long{version}"
    command = ["curl", "-sS", version, "--no-buffer", "--cacert", "server.pem", "--data-binary", "@long.wav"]
    headers = proxy.headers({"Accept": "application/x-ndjson", "X-Request-ID": name})
    for header in headers.items():
        command += ["-H", ": ".join(header)]
    process = subprocess.Popen(
        [*command, f"https://localhost:{proxy.port}/predict"], cwd=proxy.folder, stdout=subprocess.PIPE, text=True
    )
    with process:
        first = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [each["event"] for each in first] == ["start", "window"]
        assert name not in proxy.service.log  # a line of the log is written at the end of the answer
        *_, last = process.stdout
    assert json.loads(last)["event"] == "end"
    assert until(lambda: name in proxy.service.log)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("length", ["", "-H Transfer-Encoding:chunked"])
def test_a_body_that_is_too_large(proxy, version, length):
    (proxy.folder / "large").write_bytes(bytes(160 * LARGEST))
    done = proxy.shell(
        f"curl -sS {version} {length} --cacert server.pem -H 'Authorization: Bearer {proxy.key}' "
        f"-w '\\n%{{http_code}}' --data-binary @large https://localhost:{proxy.port}/predict"
    )
    message, status = done.stdout.rsplit("\n", 1)
    assert status == "413", done
    assert "AVEX_MAX_BODY_BYTES" in json.loads(message)["error"] or str(LARGEST) in json.loads(message)["error"]


def test_a_key_is_asked_for_before_the_body(proxy):
    with begun(proxy, "Content-Length: 1000") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


@contextlib.contextmanager
def begun(proxy, *headers):
    """A connection on which a request has begun, whose body doesn't come."""
    head = "\r\n".join(["POST /predict HTTP/1.1", "Host: localhost", *headers, "", ""])
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as raw,
        trust(proxy.folder).wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        connection.sendall(head.encode())
        yield connection


def infer(audio):
    request = service_pb2.ModelInferRequest(model_name="my_probe")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    request.outputs.add(name="scores")
    request.raw_input_contents.append(len(audio).to_bytes(4, "little") + audio)
    return request.SerializeToString()


@pytest.mark.parametrize(
    ("size", "keyed", "expected"), [(2 * LARGEST, True, "RESOURCE_EXHAUSTED"), (10, False, "UNAUTHENTICATED")]
)
def test_grpc_is_refused_by_the_service(proxy, size, keyed, expected):
    metadata = [("authorization", f"Bearer {proxy.key}")] if keyed else []
    with proxy.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(infer(bytes(size)), timeout=60, metadata=metadata)
    assert raised.value.code().name == expected


def test_the_standard_services_of_grpc(proxy):
    with proxy.channel() as channel:
        rpc(channel, "Check", b"", "grpc.health.v1.Health")
        assert service_pb2.ServerReadyResponse.FromString(rpc(channel, "ServerReady", b"")).ready
        metadata = [("authorization", f"Bearer {proxy.key}")]
        reflection = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        (answer,) = reflection(iter([b"\x3a\x00"]), timeout=60, metadata=metadata)  # list_services = ""
        assert SERVICE.encode() in answer


def test_a_grpc_stream(proxy):
    requests = [infer(encode(1, 48000, 2, "WAV"))] * 6
    assert sum(map(len, requests)) > 2**20  # nginx's own limit of a body, which must not hold for their sum
    metadata = [("authorization", f"Bearer {proxy.key}")]
    with proxy.channel() as channel:
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        assert len(list(stream(iter(requests), timeout=120, metadata=metadata))) >= len(requests)


def test_forwarded_headers_change_nothing(proxy):
    forged = {"X-Forwarded-For": "203.0.113.7", "Forwarded": "for=203.0.113.7", "X-Request-ID": "forged-by-a-client"}
    assert proxy.client.get("/models/my_probe", headers=proxy.headers(forged)).status_code == 200
    until(lambda: "forged-by-a-client" in proxy.service.log)
    assert "203.0.113.7" not in proxy.service.log
    line = until(lambda: next((each for each in proxy.log.splitlines() if "forged-by-a-client" in each), None))
    assert line == "127.0.0.1 GET /models/my_probe 200 forged-by-a-client"


def test_more_requests_at_once_than_allowed(proxy):
    most = int(re.search(r"limit_conn avex_clients (\d+);", CONFIGURATION)[1])
    with contextlib.ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(begun(proxy, f"Authorization: Bearer {proxy.key}", "Content-Length: 1000"))
        until(lambda: proxy.client.get("/readyz").status_code == 429)
        with proxy.channel() as channel, pytest.raises(grpc.RpcError) as raised:
            rpc(channel, "ServerReady", b"")
        assert raised.value.code().name == "UNAVAILABLE"
    until(lambda: proxy.client.get("/readyz").status_code == 200)


def test_nginx_waits_longer_than_the_service():
    seconds = {name: int(value) for name, value in re.findall(r"(\w+_timeout) (\d+)s;", CONFIGURATION)}
    defaults = Settings()
    assert seconds["proxy_read_timeout"] > defaults.timeout_seconds
    assert seconds["grpc_read_timeout"] > defaults.timeout_seconds
    assert seconds["client_body_timeout"] > defaults.read_timeout_seconds
