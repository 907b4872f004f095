"""Keys over HTTP and gRPC, and gRPC over TLS with certificates made here."""

import contextlib
import shutil
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor

import bentoml
import grpc
import httpx
import pytest
import tritonclient.grpc
import tritonclient.http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2

from avex_serve.errors import AuthenticationError, InputError
from avex_serve.service.bento import HttpsOptions
from avex_serve.service.credentials import Keys, check_https, server_credentials
from avex_serve.service.settings import Settings
from tests.clients import until
from tests.service.conftest import SERVICE as AVEX_SERVICE
from tests.service.conftest import encode, running_server
from tests.service.test_lifecycle import refused_start

KEYS = ("first-key.of~two", "c2Vjb25k+/w==", "third_key_from_a_file")
WAV = encode(0.1, 16000, 1, "WAV")
PAYLOAD = "marker-of-a-payload"
SERVICE = "/inference.GRPCInferenceService/"
PATIENCE = 20


NEW = ("req", "-x509", "-days", "2", "-nodes", "-subj", "/CN=server", "-addext", "subjectAltName = IP:127.0.0.1")


def openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with an authority, and certificates of a server on 127.0.0.1 and of a client that it signed."""
    folder = tmp_path_factory.mktemp("certificates")
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256")
    openssl(folder, *new, "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        openssl(folder, *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / "extensions").write_text("subjectAltName = IP:127.0.0.1\n")
        sign = ("x509", "-req", "-days", "2", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(folder, *sign, "-in", f"{name}.csr", "-extfile", "extensions", "-out", f"{name}.pem")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, audio_bundle, certificates):
    """Keys from both places, and gRPC that asks clients for a certificate."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"\n  field-station:{KEYS[2]}\r\n\n")
    with running_server(
        folder,
        AVEX_BUNDLE=str(audio_bundle),
        AVEX_API_KEYS=f"{KEYS[0]}, {KEYS[1]},",
        AVEX_API_KEYS_FILE=str(folder / "keys"),
        AVEX_GRPC_CERTIFICATE=str(certificates / "server.pem"),
        AVEX_GRPC_KEY=str(certificates / "server.key"),
        AVEX_GRPC_CLIENT_CA=str(certificates / "ca.pem"),
    ) as server:
        yield server
    assert not any(key in server.log for key in KEYS)
    assert PAYLOAD not in server.log


@pytest.fixture
def channel(server, certificates):
    files = [(certificates / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem")]
    with grpc.secure_channel(server.grpc, grpc.ssl_channel_credentials(*files)) as channel:
        yield channel


def bearer(key):
    return {"authorization": f"Bearer {key}"}


GUARDED = [
    ("GET", "/"),
    ("GET", "/metrics"),
    ("GET", "/docs.json"),
    ("GET", "/schema.json"),
    ("GET", "/static_content/main.js"),
    ("GET", "/nothing"),
    ("GET", "/livez/"),
    ("GET", "//livez"),
    ("GET", "/livez%0a"),
    ("GET", "/LIVEZ"),
    ("GET", "/predict/../livez"),
    ("GET", "/v2"),
    ("GET", "/v2/health"),
    ("GET", "/v2/health/live/"),
    ("GET", "/v2/models/tiny"),
    ("GET", "/v2/models/tiny/ready"),
    ("POST", "/v2/models/tiny/infer"),
    ("POST", "/predict"),
    ("POST", "/embed"),
    ("POST", "/classify"),
    ("OPTIONS", "/predict"),
    ("HEAD", "/"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_everything_needs_a_key(server, method, path):
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.http_port), PATIENCE)) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n".encode())
        answer = connection.recv(1000)  # before the body has come
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"www-authenticate: bearer" in answer.lower()


@pytest.mark.parametrize("path", ["/livez", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_health_needs_none(server, path):
    assert server.get(path).status_code == 200


REFUSED = {
    "empty": "",
    "scheme alone": "Bearer",
    "without scheme": KEYS[0],
    "another scheme": f"Basic {KEYS[0]}",
    "cut": f"Bearer {KEYS[0][:-1]}",
    "longer": f"Bearer {KEYS[0]}x",
    "another case": f"Bearer {KEYS[0].upper()}",
    "two": f"Bearer {KEYS[0]} {KEYS[1]}",
    "list": f"Bearer {KEYS[0]},{KEYS[1]}",
    "another": "Bearer nothing",
    "not ASCII": "Bearer schlüssel",
}


@pytest.mark.parametrize("header", REFUSED.values(), ids=REFUSED)
def test_wrong_key(server, channel, header):
    headers = {"authorization": header.encode("latin-1")}
    answer = server.client.post("/predict", content=PAYLOAD, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not any(key in answer.text for key in KEYS)
    if header.isascii():
        assert rpc_error(channel, "ModelInfer", header)[0] == "UNAUTHENTICATED"


@pytest.mark.parametrize("key", KEYS)
def test_key(server, channel, predict, key):
    for header in (f"Bearer {key}", f"bearer  {key}"):
        answer = server.client.post("/predict", content=WAV, headers={"authorization": header})
        assert answer.json() == predict(WAV)
    answer = channel.unary_unary(f"{SERVICE}ModelInfer")(
        infer_request(), metadata=(("authorization", f"Bearer {key}"),), timeout=PATIENCE
    )
    assert service_pb2.ModelInferResponse.FromString(answer).model_name == "tiny"


def infer_request():
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(WAV).to_bytes(4, "little") + WAV)
    return request.SerializeToString()


def rpc_error(channel, method, authorization=None):
    metadata = () if authorization is None else (("authorization", authorization),)
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"{SERVICE}{method}")(PAYLOAD.encode(), metadata=metadata, timeout=PATIENCE)
    return caught.value.code().name, caught.value.details()


@pytest.mark.parametrize("method", ["ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer", "Nothing"])
def test_every_method_needs_a_key(channel, method):
    code, details = rpc_error(channel, method)
    assert code == "UNAUTHENTICATED"
    assert "Authorization: Bearer KEY" in details


def test_health_over_grpc_needs_none(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == serving
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert next(watch).status == serving
    watch.cancel()
    for method in ("ServerLive", "ServerReady"):
        assert channel.unary_unary(f"{SERVICE}{method}")(b"", timeout=PATIENCE)


def test_clients_with_a_key(server, certificates, tmp_path, predict):
    path = tmp_path / "recording.wav"
    path.write_bytes(WAV)
    with bentoml.SyncHTTPClient(server.url, token=KEYS[0]) as client:
        assert client.predict(audio=path) == predict(WAV)
        client._temp_dir.cleanup()  # which closing forgets
    with tritonclient.http.InferenceServerClient(server.http) as client:
        assert client.get_model_metadata("tiny", headers=bearer(KEYS[1]))["name"] == "tiny"
        assert client.is_server_live()
    with tritonclient.grpc.InferenceServerClient(
        server.grpc,
        ssl=True,
        root_certificates=str(certificates / "ca.pem"),
        private_key=str(certificates / "client.key"),
        certificate_chain=str(certificates / "client.pem"),
    ) as client:
        assert client.get_model_metadata("tiny", headers=bearer(KEYS[1])).name == "tiny"
        assert client.is_server_live()


def test_http_over_tls(tmp_path, certificates, audio_bundle, predict):
    files = ("--ssl-certfile", str(certificates / "server.pem"), "--ssl-keyfile", str(certificates / "server.key"))
    with running_server(
        tmp_path, service=(AVEX_SERVICE, *files), authority=certificates / "ca.pem", AVEX_BUNDLE=str(audio_bundle)
    ) as server:
        assert server.url.startswith("https://")
        assert server.post("/predict", content=WAV).json() == predict(WAV)
        with tritonclient.http.InferenceServerClient(
            server.http, ssl=True, ssl_options={"ca_certs": str(certificates / "ca.pem")}
        ) as client:
            assert client.is_server_ready()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{server.http}/livez")


PLAIN = {"certfile": "server.pem", "keyfile": "server.key"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {"certfile": "nowhere.pem", "keyfile": "server.key"},
            r"--ssl-certfile: .*nowhere\.pem can't be read: No such",
        ),
        (
            {"certfile": "server.pem", "keyfile": "nowhere.key"},
            r"--ssl-keyfile: .*nowhere\.key can't be read: No such",
        ),
        ({"certfile": "server.pem", "keyfile": "client.key"}, "can't be used .*KEY_VALUES_MISMATCH"),
        ({"certfile": "server.pem"}, "can't be used .*expected a certificate chain and its key"),
        ({"keyfile": "server.key"}, "--ssl-keyfile is set without --ssl-certfile"),
        ({"certfile": "server.pem", "keyfile": "locked.key"}, "can't be used .*--ssl-keyfile-password"),
        ({"certfile": "server.pem", "keyfile": "locked.key", "keyfile_password": "wrong"}, "can't be used"),
        ({"certfile": "server.pem", "keyfile": "server.key", "ca_certs": "locked.key"}, "can't be used"),
        ({"ca_certs": "ca.pem"}, "--ssl-ca-certs is set without --ssl-certfile"),
        ({"cert_reqs": 2}, "--ssl-cert-reqs is set without --ssl-certfile"),
        ({"enabled": True}, "enables ssl without a certificate"),
        (PLAIN | {"ca_certs": "ca.pem"}, "--ssl-ca-certs is set, and clients are not asked .*--ssl-cert-reqs 2"),
        (PLAIN | {"cert_reqs": 2}, "--ssl-cert-reqs is 2 without --ssl-ca-certs"),
        (PLAIN | {"cert_reqs": 7, "ca_certs": "ca.pem"}, "--ssl-cert-reqs is 7; expected --ssl-cert-reqs 2"),
        (PLAIN | {"version": 99}, "--ssl-version is 99, which no server can use"),
        (PLAIN | {"version": 10**30}, "--ssl-version is 10+, which no server can use"),
        (PLAIN | {"version": int(ssl.PROTOCOL_TLS_CLIENT)}, "--ssl-version is 16, which no server can use"),
        (PLAIN | {"ciphers": "NOSUCH"}, "--ssl-ciphers is 'NOSUCH', which OpenSSL doesn't know"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_certificates_of_http_that_can_not_be_used(certificates, files, reason):
    lock_key(certificates)
    with pytest.raises(InputError, match=reason) as caught:
        check_https(https_options(certificates, files))
    assert "wrong" not in str(caught.value)


def test_certificates_of_http_that_can_be_used(certificates):
    lock_key(certificates)
    locked = {"certfile": "server.pem", "keyfile": "locked.key", "keyfile_password": "secret"}
    both = certificates / "both.pem"
    both.write_bytes((certificates / "server.pem").read_bytes() + (certificates / "server.key").read_bytes())
    asked = {"ca_certs": "ca.pem", "cert_reqs": 2}
    newer = {"version": int(ssl.PROTOCOL_TLSv1_2), "ciphers": "ECDHE+AESGCM:ECDHE+CHACHA20"}
    for options in ({}, PLAIN, PLAIN | asked, PLAIN | newer, locked, {"certfile": "both.pem"}):
        check_https(https_options(certificates, options))


def https_options(folder, options):
    paths = {
        field: folder / options[name]
        for field, name in (("certificate", "certfile"), ("key", "keyfile"), ("client_ca", "ca_certs"))
        if name in options
    }
    others = {
        field: options[name]
        for field, name in (
            *(("password", "keyfile_password"), ("asks_clients", "cert_reqs")),
            *((each, each) for each in ("enabled", "version", "ciphers")),
        )
        if name in options
    }
    return HttpsOptions(**paths, **others)


def lock_key(folder):
    openssl(folder, "ec", "-in", "server.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")


@pytest.mark.parametrize("by", ["option", "configuration"])
def test_service_does_not_start_with_a_bad_certificate_of_http(tmp_path, audio_bundle, by):
    """Its workers would die of it, again and again."""
    variables, options = {"AVEX_BUNDLE": str(audio_bundle)}, ()
    if by == "option":
        options = ("--ssl-certfile", "nowhere.pem")
    else:
        (tmp_path / "bentoml.yaml").write_text(
            "services: {AvexService: {ssl: {enabled: true, certfile: nowhere.pem}}}\n"
        )
        variables["BENTOML_CONFIG"] = str(tmp_path / "bentoml.yaml")
    message = refused_start(tmp_path, *options, **variables)
    assert "--ssl-certfile: nowhere.pem can't be read: No such file or directory" in message


@pytest.mark.parametrize(("option", "value"), [("version", "99"), ("ciphers", "NOSUCH")], ids=["version", "ciphers"])
@pytest.mark.parametrize("by", ["option", "configuration"])
def test_service_does_not_start_with_tls_that_nobody_can_use(
    tmp_path, audio_bundle, certificates, option, value, by
):
    """Its workers would die of it, again and again, each with a traceback."""
    files = {name: str(certificates / name) for name in ("server.pem", "server.key")}
    variables, options = {"AVEX_BUNDLE": str(audio_bundle)}, ()
    if by == "option":
        options = ("--ssl-certfile", files["server.pem"], "--ssl-keyfile", files["server.key"])
        options += (f"--ssl-{option}", value)
    else:
        ssl_section = f"enabled: true, certfile: {files['server.pem']}, keyfile: {files['server.key']}"
        (tmp_path / "bentoml.yaml").write_text(
            f"services: {{AvexService: {{ssl: {{{ssl_section}, {option}: {value}}}}}}}\n"
        )
        variables["BENTOML_CONFIG"] = str(tmp_path / "bentoml.yaml")
    message = refused_start(tmp_path, *options, **variables)
    assert message.count("\n") == 1
    assert f"--ssl-{option} is " in message


def test_channels_that_are_not_trusted(server, certificates):
    """In plain text, and over TLS without the client's certificate or with one that nobody signed."""
    ca = (certificates / "ca.pem").read_bytes()
    openssl(
        certificates,
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-x509", "-days", "2"),
        *("-subj", "/CN=stranger", "-keyout", "stranger.key", "-out", "stranger.pem"),
    )
    stranger = [(certificates / f"stranger.{end}").read_bytes() for end in ("key", "pem")]
    for open_channel in (
        lambda: grpc.insecure_channel(server.grpc),
        lambda: grpc.secure_channel(server.grpc, grpc.ssl_channel_credentials(ca)),
        lambda: grpc.secure_channel(server.grpc, grpc.ssl_channel_credentials(ca, *stranger)),
    ):
        with open_channel() as channel:
            assert rpc_error(channel, "ServerLive")[0] == "UNAVAILABLE"


# What is renewed


@pytest.fixture
def renewable(tmp_path, certificates, audio_bundle):
    """A server with copies of the files, and their folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("server.pem", "server.key"):
        shutil.copy(certificates / name, folder)
    (folder / "keys").write_text("key-of-before\n")
    with running_server(
        tmp_path,
        AVEX_BUNDLE=str(audio_bundle),
        AVEX_API_KEYS_FILE=str(folder / "keys"),
        AVEX_GRPC_CERTIFICATE=str(folder / "server.pem"),
        AVEX_GRPC_KEY=str(folder / "server.key"),
    ) as server:
        yield server, folder


def test_files_are_read_again(renewable, certificates):
    server, folder = renewable

    def status(key):
        return server.client.get("/v2/models/tiny", headers=bearer(key)).status_code

    def trusted(authority):
        with grpc.secure_channel(server.grpc, grpc.ssl_channel_credentials(authority.read_bytes())) as channel:
            try:
                return channel.unary_unary(f"{SERVICE}ServerLive")(b"", timeout=PATIENCE)
            except grpc.RpcError as error:
                return error.code() is not grpc.StatusCode.UNAVAILABLE

    (folder / "keys").write_text("no key at all\n")
    until(lambda: status("key-of-before") == 200 and "entry 1 is not a key" in server.log)
    assert status("key-of-now") == 401
    (folder / "keys").write_text("key-of-now\n")
    until(lambda: status("key-of-now") == 200)
    assert status("key-of-before") == 401

    own = (
        "-subj",
        "/CN=server",
        "-addext",
        "subjectAltName = IP:127.0.0.1",
        "-keyout",
        "new.key",
        "-out",
        "new.pem",
    )
    openssl(folder, *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-x509"), *own)
    before, now = certificates / "ca.pem", folder / "new.pem"
    assert trusted(before)
    shutil.copy(folder / "new.pem", folder / "server.pem")  # its key isn't there yet
    until(lambda: trusted(before) and "KEY_VALUES_MISMATCH" in server.log)
    assert not trusted(now)
    shutil.copy(folder / "new.key", folder / "server.key")
    until(lambda: trusted(now))
    assert not trusted(before)


def test_the_name_of_a_key_is_in_log_and_metrics(server):
    headers = {"Authorization": f"Bearer {KEYS[2]}", "X-Request-ID": "named"}
    assert server.client.get("/v2", headers=headers).status_code == 200
    line = until(lambda: [line for line in server.log.splitlines() if "request_id=named" in line])[0]
    assert "key=field-station" in line
    text = server.client.get("/metrics", headers=headers).text
    assert 'avex_key_requests_total{key="field-station",status="2xx"}' in text
    assert not any(key in text for key in KEYS)


# What doesn't start


def settings(**variables):
    return Settings.from_environment(variables)


def test_no_keys_let_everybody_in():
    assert Keys.from_settings(settings()).check(None) == ""


def test_keys_have_names(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufefflab:first\nlab:second\nunnamed==\n", "utf-8")  # as Windows' editors begin it
    keys = Keys.from_settings(settings(AVEX_API_KEYS="farm:other", AVEX_API_KEYS_FILE=str(path)))
    names = [keys.check(f"Bearer {key}") for key in ("first", "second", "unnamed==", "other")]
    assert names == ["lab", "lab", "", "farm"]
    for key, remedy in (("lab:first", "send the key alone, without a name"), ("lab", "send one of the keys")):
        with pytest.raises(AuthenticationError, match=remedy):
            keys.check(f"Bearer {key}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (",", "is set and holds no key"),
        ("good,s3cret with blank", "entry 2 is not a key"),
        ("schlüssel", "entry 1 is not"),
        ("a:b:s3cret", "entry 1 is not a key"),
        ("# of the s3cret lab,lab:s3cret", "entry 1 is not a key.*without spaces, quotes and comments"),
        (":s3cret", "entry 1 is not a key"),
        ("lab:s3cret,farm:s3cret", "entry 2 repeats a key under another name"),
    ],
)
def test_keys_that_are_none(tmp_path, text, reason):
    path = tmp_path / "keys"
    path.write_text(text.replace(",", "\n"))
    for variables in ({"AVEX_API_KEYS": text}, {"AVEX_API_KEYS_FILE": str(path)}):
        with pytest.raises(InputError, match=reason) as caught:
            Keys.from_settings(settings(**variables))
        assert "s3cret" not in str(caught.value)


def test_key_file_that_can_not_be_read(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in (
        (tmp_path / "nowhere", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "not text"),
    ):
        with pytest.raises(InputError, match=reason):
            Keys.from_settings(settings(AVEX_API_KEYS_FILE=str(path)))


def test_settings_never_show_keys():
    with_keys = settings(AVEX_API_KEYS="s3cret")
    assert "s3cret" not in f"{with_keys!r} {with_keys} {with_keys.model_dump()} {with_keys.model_dump_json()}"
    with pytest.raises(InputError) as caught:
        settings(AVEX_API_KEYS="s3cret", AVEX_QUEUE="-1")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(AuthenticationError) as refusal:
        Keys.from_settings(with_keys).check("Bearer s3cret-and-more")
    assert "s3cret" not in str(refusal.value)


def test_certificates_that_can_not_be_used(certificates, tmp_path):
    lock_key(certificates)
    (certificates / "nonsense").write_text("nonsense")

    def of(**files):
        return {f"AVEX_GRPC_{name.upper()}": str(certificates / file) for name, file in files.items()}

    for variables, reason in (
        (of(certificate="server.pem"), "AVEX_GRPC_CERTIFICATE and AVEX_GRPC_KEY together"),
        (of(key="server.key"), "AVEX_GRPC_CERTIFICATE and AVEX_GRPC_KEY together"),
        (of(client_ca="ca.pem"), "without AVEX_GRPC_CERTIFICATE"),
        (of(certificate="nowhere", key="server.key"), "AVEX_GRPC_CERTIFICATE: .*nowhere can't be read"),
        (of(certificate="server.pem", key="client.key"), "KEY_VALUES_MISMATCH"),
        (of(certificate="nonsense", key="server.key"), "can't be used"),
        (of(certificate="server.pem", key="locked.key"), "without a password"),
        (of(certificate="server.pem", key="server.key", client_ca="nonsense"), "can't be used"),
    ):
        with pytest.raises(InputError, match=reason):
            server_credentials(settings(**variables))
    assert server_credentials(settings()) is None
    assert server_credentials(settings(**of(certificate="server.pem", key="server.key"))) is not None


def test_service_does_not_start_without_the_keys_that_it_was_told(tmp_path, audio_bundle):
    message = refused_start(tmp_path, AVEX_BUNDLE=str(audio_bundle), AVEX_API_KEYS_FILE=str(tmp_path / "nowhere"))
    assert "AVEX_API_KEYS_FILE" in message


def test_service_does_not_start_with_half_a_certificate(tmp_path, audio_bundle):
    message = refused_start(tmp_path, AVEX_BUNDLE=str(audio_bundle), AVEX_GRPC_KEY="server.key")
    assert "AVEX_GRPC_CERTIFICATE and AVEX_GRPC_KEY together" in message


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        (("rsa:2048",), True),
        (("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"), True),
        (("ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"), True),
        (("ec", "-pkeyopt", "ec_paramgen_curve:secp521r1"), False),
        (("ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"), False),
        (("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-pkeyopt", "ec_param_enc:explicit"), False),
        (("ed25519",), False),
        (("rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"), False),
    ],
    ids=lambda value: "-".join(value).rpartition(":")[2] if isinstance(value, tuple) else "",
)
def test_keys_of_certificates_that_grpc_signs_with(tmp_path, kind, taken):
    """Those that are taken are those with which a channel to gRPC's own server is made."""
    openssl(tmp_path, *NEW, "-newkey", *kind, "-keyout", "server.key", "-out", "server.pem")
    settings = Settings(grpc_certificate=tmp_path / "server.pem", grpc_key=tmp_path / "server.key")
    if not taken:
        with pytest.raises(
            InputError, match="gRPC can't sign with the key of AVEX_GRPC_CERTIFICATE; expected one of"
        ):
            server_credentials(settings)
        return
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(settings))
    server.start()
    with grpc.secure_channel(
        f"127.0.0.1:{port}", grpc.ssl_channel_credentials((tmp_path / "server.pem").read_bytes())
    ) as channel:
        grpc.channel_ready_future(channel).result(PATIENCE)
    server.stop(None).wait()
    server.wait_for_termination()
