"""BentoML's section `http` of BENTOML_CONFIG holds for our routes too, or stops the start."""

import re
import subprocess

import pytest
import yaml

from avex_serve.errors import InputError
from avex_serve.service.bento import check_names
from tests.service.conftest import SERVICE, free_ports, running_server, serve_command, server_environment

ORIGIN, KEY = "http://localhost:5173", "a-key"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
CORS = {
    "enabled": True,
    "access_control_allow_origins": [ORIGIN],
    "access_control_allow_methods": ["GET", "POST"],
    "access_control_allow_headers": ["*"],
}


def configuration(folder, http):
    path = folder / "bentoml.yaml"
    path.write_text(yaml.safe_dump({"services": {"AvexService": {"http": http}}}))
    return str(path)


@pytest.fixture(scope="module", params=[None, KEY], ids=["open", "with keys"])
def server(request, tmp_path_factory, audio_bundle):
    folder = tmp_path_factory.mktemp("cors")
    keys = {} if request.param is None else {"AVEX_API_KEYS": request.param}
    config = configuration(folder, {"cors": CORS, "response": {"trace_id": False}})
    with running_server(folder / "server", AVEX_BUNDLE=str(audio_bundle), BENTOML_CONFIG=config, **keys) as server:
        yield server, request.param


@pytest.mark.parametrize("path", ["/predict", "/embed", "/v2/models/tiny/infer", "/", "/schema.json"])
def test_preflights_need_no_key(server, path):
    answer = server[0].client.options(path, headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    refused = server[0].client.options(path, headers={**PREFLIGHT, "Origin": "http://elsewhere"})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


def test_answers_and_refusals_name_the_origin(server, wav):
    server, key = server
    headers = {"Origin": ORIGIN} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    for path, content, status in (("/predict", wav, 200), ("/predict", b"no audio", 400), ("/v2/nothing", b"", 404)):
        answer = server.client.post(path, content=content, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, ORIGIN)
        assert (
            "access-control-allow-origin"
            not in server.client.post(
                path, content=content, headers={**headers, "Origin": "http://elsewhere"}
            ).headers
        )
    if key is not None:
        answer = server.client.post("/predict", content=wav, headers={"Origin": ORIGIN})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, ORIGIN)


def test_the_id_of_the_span_is_sent(tmp_path, audio_bundle, wav):
    config = configuration(tmp_path, {"response": {"trace_id": True}})
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    with running_server(
        tmp_path / "server", AVEX_BUNDLE=str(audio_bundle), BENTOML_CONFIG=config, **traced
    ) as server:
        parent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        for answer in (
            server.client.post("/predict", content=wav, headers=parent),
            server.client.post("/predict", content=b"no audio", headers=parent),
        ):
            assert answer.headers.get_list("x-bentoml-trace-id") == ["ab" * 16]
        assert "x-bentoml-trace-id" not in server.get("/livez").headers, "probes have no span"


def section(**settings):
    return {"services": {"AvexService": settings}}


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (section(sll={"enabled": True}), "services.AvexService.sll; did you mean ssl?"),
        (section(ssl={"enabled": True, "certfle": "x"}), "services.AvexService.ssl.certfle; did you mean certfile?"),
        (section(http={"cors": {"enabld": True}}), "services.AvexService.http.cors.enabld; did you mean enabled?"),
        ({"services": {"Avexservice": {"workers": 2}}}, "services.Avexservice; did you mean AvexService?"),
        ({"services": {"http": {"prot": 80}}}, "services.http.prot; did you mean port?"),
        ({"services": {"sll": {"enabled": True}}}, "services.sll.enabled; expected one of traffic, "),
        ({"api_server": {"ssl": {"enabled": True}}}, "api_server; expected services."),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_names_that_bentoml_would_ignore(tmp_path, monkeypatch, document, fault):
    """A misspelt `ssl` would leave HTTP in plain text."""
    (tmp_path / "bentoml.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setenv("BENTOML_CONFIG", str(tmp_path / "bentoml.yaml"))
    with pytest.raises(InputError, match=re.escape(fault)):
        check_names("AvexService")


def test_names_that_bentoml_knows(tmp_path, monkeypatch):
    tracing = {"exporter_type": "otlp", "otlp": {"protocol": "http", "http": {"headers": {"any": "name"}}}}
    known = section(http={"port": 80, "cors": CORS}, tracing=tracing, resources={"cpu": 1}, workers=2)
    known["services"] |= {"Another": {"traffic": {"concurrency": 3}}, "ssl": {"enabled": False}}
    for document in (known, {"version": 2}, {"services": None}):
        (tmp_path / "bentoml.yaml").write_text(yaml.safe_dump(document))
        monkeypatch.setenv("BENTOML_CONFIG", str(tmp_path / "bentoml.yaml"))
        check_names("AvexService")
    monkeypatch.delenv("BENTOML_CONFIG")
    check_names("AvexService")


@pytest.mark.parametrize(
    ("http", "message"),
    [
        ({"prot": 80}, "services.AvexService.http.prot; did you mean port?"),
        ({"proxy_port": 9000}, "sets http.proxy_port to 9000"),
        ({"cors": {"enabled": True}}, "enables http.cors without an origin"),
    ],
    ids=["misspelt", "proxy port", "no origin"],
)
def test_settings_without_effect_stop_the_start(tmp_path, audio_bundle, http, message):
    http_port, grpc_port = free_ports(2)
    environment = server_environment(
        tmp_path / "home",
        AVEX_BUNDLE=str(audio_bundle),
        AVEX_GRPC_HOST="127.0.0.1",
        AVEX_GRPC_PORT=str(grpc_port),
        BENTOML_CONFIG=configuration(tmp_path, http),
    )
    result = subprocess.run(
        serve_command(http_port, SERVICE), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
