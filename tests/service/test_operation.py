"""What people who run the service see: metrics, logs, traces, pages. Two workers, logs in JSON, traces collected."""

import contextlib
import hashlib
import json
import re
import socket

import grpc
import httpx
import pytest
import tritonclient.grpc
from jsonschema import Draft202012Validator
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from avex_serve.scheduling.cores import usable_cores
from avex_serve.service import AvexService
from avex_serve.service.http.app import ENDPOINTS
from avex_serve.service.http.page import ASSETS
from avex_serve.service.oip.protocol import REFUSED_PATHS
from tests.clients import until
from tests.service.conftest import encode, free_ports, running_server
from tests.standin import Handler, StandIn

PATIENCE = 30  # seconds
MODEL_READY = "/inference.GRPCInferenceService/ModelReady"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


class Collector(StandIn):
    """An OpenTelemetry collector: OTLP over HTTP."""

    def __init__(self):
        self.spans = []
        spans = self.spans

        class Answer(Handler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend((span, resource.resource) for span in scope.spans)
                self.send_response(200)
                self.end_headers()

        super().__init__(Answer)


@pytest.fixture(scope="module")
def collector():
    with Collector().running() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory, audio_bundle, collector):
    folder = tmp_path_factory.mktemp("operated")
    (folder / "bentoml.yml").write_text(
        "services:\n  AvexService:\n    http:\n      response:\n        trace_id: true\n"
    )
    (metrics_port,) = free_ports(1)
    variables = {
        "AVEX_BUNDLE": str(audio_bundle),
        "AVEX_LOG_FORMAT": "json",
        "AVEX_WORKERS": "2",
        "AVEX_METRICS_HOST": "127.0.0.1",
        "AVEX_METRICS_PORT": str(metrics_port),
        "BENTOML_CONFIG": str(folder / "bentoml.yml"),  # BentoML says that it reads it, as JSON too
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_SERVICE_NAME": "bioacoustics",
        "OTEL_BSP_SCHEDULE_DELAY": "50",  # milliseconds
    }
    with running_server(folder, **variables) as server:
        yield server


def metrics(server):
    """Every sample by name and labels."""
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def sample(name, /, **labels):
    return (name, *sorted(labels.items()))


def grown(before, after):
    return {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}


def log_lines(server):
    return [json.loads(line) for line in server.log.splitlines()]


def line_of(server, identity):
    return until(lambda: [line for line in log_lines(server) if line.get("request_id") == identity])


@contextlib.contextmanager
def channel(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


def test_requests_and_stages_are_counted_over_all_workers(server, wav):
    before = metrics(server)
    for _ in range(20):  # a connection each, so that both workers have a part in it
        assert httpx.post(f"{server.url}/predict", content=wav).status_code == 200
    assert server.post("/predict", content=b"no audio").status_code == 400
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        assert client.is_model_ready("tiny")
    with channel(server) as each, pytest.raises(grpc.RpcError):
        each.unary_unary("/some/where")(b"")
    growth = grown(before, metrics(server))
    predict = {"transport": "http", "route": "/predict"}
    model = {"model": "tiny", "version": "1"}
    assert growth[sample("avex_model_request_duration_seconds_count", **model)] == 20
    assert growth[sample("avex_audio_seconds_total", **model)] == pytest.approx(20 * 0.37, rel=1e-3)
    assert growth[sample("avex_stage_cpu_seconds_total", stage="infer")] > 0
    assert growth[sample("avex_requests_total", **predict, status="2xx")] == 20
    assert growth[sample("avex_requests_total", **predict, status="4xx")] == 1
    assert growth[sample("avex_request_duration_seconds_count", **predict)] == 21
    ready = {"transport": "grpc", "route": MODEL_READY[1:]}
    assert growth[sample("avex_requests_total", **ready, status="OK")] == 1
    assert growth[sample("avex_requests_total", transport="grpc", route="other", status="UNIMPLEMENTED")] == 1
    assert growth[sample("avex_stage_duration_seconds_count", stage="decode")] == 21
    assert growth[sample("avex_stage_duration_seconds_count", stage="resample")] == 20
    assert growth[sample("avex_stage_duration_seconds_count", stage="infer")] == 20
    assert growth[sample("avex_stage_duration_seconds_count", stage="queue")] == 21
    assert (
        growth[sample("avex_batch_size_count")] == growth[sample("avex_batch_size_bucket", le="1.0")] == 20 * 4
    )  # windows


def test_model_that_is_served(server, audio_bundle):
    digest = hashlib.sha256((audio_bundle / "manifest.json").read_bytes()).hexdigest()
    labels = {"name": "tiny", "version": "1", "format": "onnx", "device": "cpu", "digest": digest}
    assert metrics(server)[sample("avex_model_info", **labels)] == 1
    served = sample("avex_bundle_changes_total", change="served")
    assert until(lambda: metrics(server).get(served) == 2), "each worker serves it"


def test_nobody_can_make_series(server):
    server.get("/nowhere")
    before = metrics(server)
    for number in range(500):
        assert server.get(f"/random/{number}").status_code == 404
    after = metrics(server)
    assert set(after) - set(before) <= {
        sample("avex_requests_total", transport="http", route="/metrics", status="2xx")
    }
    assert grown(before, after)[sample("avex_requests_total", transport="http", route="other", status="4xx")] == 500
    server.get("/v2/models/a/ready")
    before = set(metrics(server))
    for number in range(20):
        assert server.get(f"/v2/models/{number}/ready").status_code == 404
    assert set(metrics(server)) == before


def test_request_ids(server, wav):
    given = server.client.post("/predict", content=wav, headers={"X-Request-ID": "field-trip.7"})
    assert given.headers["x-request-id"] == "field-trip.7"
    made = [server.post("/predict", content=wav).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    for bad in ("spaces and\ttabs", "x" * 129, '"}'):
        answer = server.client.get("/v2", headers={"X-Request-ID": bad})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert server.get("/nowhere").headers["x-request-id"]


def test_request_ids_over_grpc(server):
    with channel(server) as each:
        call = each.unary_unary(MODEL_READY).future(b"\n\x04tiny", metadata=[("x-request-id", "call.1")])
        assert dict(call.initial_metadata())["x-request-id"] == "call.1"
        failed = each.unary_unary(MODEL_READY).future(b"\n\x04none", metadata=[("x-request-id", "call.2")])
        assert failed.code() == grpc.StatusCode.NOT_FOUND
        assert dict(failed.initial_metadata())["x-request-id"] == "call.2"
        before = metrics(server)
        stream = each.stream_stream(STREAM)(iter([b""]), metadata=[("x-request-id", "call.3")], timeout=60)
        assert len(list(stream)) == 1, "the request names no model, which its answer says"
        assert stream.code() == grpc.StatusCode.OK
        assert dict(stream.initial_metadata())["x-request-id"] == "call.3"
        counted = sample("avex_requests_total", transport="grpc", route=STREAM[1:], status="NOT_FOUND")
        assert grown(before, metrics(server))[counted] == 1
    (line,) = line_of(server, "call.3")
    assert (line["route"], line["status"]) == (STREAM[1:], "NOT_FOUND")
    (line,) = line_of(server, "call.2")
    assert (line["route"], line["status"], line["transport"]) == (MODEL_READY[1:], "NOT_FOUND", "grpc")


def test_a_line_of_json_for_each_request(server, wav):
    secret = "confidential.wav"
    server.client.post(
        "/predict",
        params={"probe": "linear"},
        files={"audio": (secret, wav)},
        headers={"X-Request-ID": "line", "Authorization": f"Bearer {secret}"},
    )
    (line,) = line_of(server, "line")
    expected = {"transport": "http", "method": "POST", "route": "/predict", "status": "200", "model": "tiny"}
    assert {**expected, "version": "1", "audio_s": 0.37}.items() <= line.items()
    assert line["worker"] in (1, 2)
    assert line["cpu_ms"] > 0
    stages = ("decode_ms", "resample_ms", "queue_ms", "infer_ms")
    assert sum(line[stage] for stage in stages) <= line["duration_ms"]
    assert line["level"] == "INFO"
    assert line["batches"] == 4
    assert line["duration_ms"] >= line["decode_ms"] > 0
    assert secret not in server.log
    server.get("/readyz")
    server.client.get("/v2", headers={"X-Request-ID": "after"})
    line_of(server, "after")
    assert not any(line.get("route") in ("/readyz", "/metrics") for line in log_lines(server))


def test_metrics_have_a_port_of_their_own(server):
    port = int(server.environment["AVEX_METRICS_PORT"])
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert "avex_model_info" in answer.text
    assert httpx.get(f"http://127.0.0.1:{port}/predict").status_code == 404


def test_no_path_forges_a_line(server):
    server.client.get("/%0Aforged", headers={"X-Request-ID": "forger"})
    (line,) = line_of(server, "forger")
    assert line["path"] == "/%0Aforged"


def test_text_log_has_the_id_and_errors_too(audio_server, wav):
    audio_server.client.post("/predict", content=wav, headers={"X-Request-ID": "in-text"})
    found = until(lambda: re.findall(r".*http POST /predict 200 .*request_id=in-text\)", audio_server.log))
    assert len(found) == 1


def test_traces(server, collector, wav):
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-ID": "traced"}
    server.client.post("/predict", content=wav, headers=headers)
    with channel(server) as each:
        each.unary_unary(MODEL_READY)(b"\n\x04tiny", metadata=[("traceparent", headers["traceparent"])])

    def spans():
        found = {span.name: (span, resource) for span, resource in collector.spans if span.trace_id.hex() == trace}
        return found if len(found) == 2 else None

    found = until(spans)
    assert set(found) == {"POST /predict", MODEL_READY[1:]}
    span, resource = found["POST /predict"]
    assert span.parent_span_id.hex() == "b7ad6b7169203331"
    attributes = {each.key: each.value for each in span.attributes}
    assert attributes["http.route"].string_value == "/predict"
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["avex.request_id"].string_value == "traced"
    assert attributes["avex.infer.seconds"].double_value > 0
    assert {each.key: each.value.string_value for each in resource.attributes}["service.name"] == "bioacoustics"
    (line,) = line_of(server, "traced")
    assert line["trace_id"] == trace


def test_requests_of_a_connection_have_spans_of_their_own(server, collector):
    ask = "GET /models/tiny HTTP/1.1\r\nHost: a\r\nX-Request-ID: piped-{}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port), PATIENCE) as connection:
        connection.sendall("".join(map(ask.format, range(8))).encode())
        until(lambda: len(line_of(server, "piped-7")) == 1)

    def spans():
        found = [span for span, _ in collector.spans if "piped-" in str(span.attributes)]
        return found if len(found) == 8 else None

    found = until(spans)
    assert not any(span.parent_span_id for span in found)
    assert len({span.trace_id for span in found}) == 8


def test_traces_as_bentoml_is_configured(tmp_path, audio_bundle, collector, wav):
    otlp = {"protocol": "http", "endpoint": f"{collector.url}/v1/traces", "http": {}}
    tracing = {"exporter_type": "otlp", "sample_rate": 1.0, "otlp": otlp}
    config = {"services": {"AvexService": {"tracing": tracing}}}
    (tmp_path / "bentoml.yml").write_text(json.dumps(config))  # which is YAML too
    variables = {"BENTOML_CONFIG": str(tmp_path / "bentoml.yml"), "OTEL_BSP_SCHEDULE_DELAY": "50"}
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    parent = f"00-{trace}-00f067aa0ba902b7-01"
    with running_server(tmp_path, AVEX_BUNDLE=str(audio_bundle), **variables) as server:
        server.client.post("/predict", content=wav, headers={"traceparent": parent})
        with channel(server) as each:
            each.unary_unary(MODEL_READY)(b"\n\x04tiny", metadata=[("traceparent", parent)])
        found = {"POST /predict", MODEL_READY[1:]}
        until(lambda: found <= {span.name for span, _ in collector.spans if span.trace_id.hex() == trace})


def test_workers_share_the_cores(server, audio_server):
    threads = [each.get("/").json()["models"][0]["threads"] for each in (audio_server, server)]
    assert threads == [usable_cores(), max(1, usable_cores() // 2)]


def test_home_page(server, wav, tmp_path):
    for accept in ("*/*", "application/json", ""):
        page = server.client.get("/", headers={"accept": accept}).json()
        assert page["models"][0]["name"] == "tiny"
        assert page["models"][0]["labels"] == {"linear": 3}
        assert page["models"][0]["licence"] == "MIT"
        assert page["grpc_port"] == server.grpc_port
    browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    answer = server.client.get("/", headers={"accept": browser})
    assert answer.headers["content-type"].startswith("text/html")
    hostile = server.client.get("/", headers={"accept": browser, "host": "<script>alert(1)</script>"})
    assert "alert" not in hostile.text
    assert not re.findall(r"(?:src|href)=\"?(?:https?:|//)", answer.text), "it loads from nowhere else"


def test_openapi_names_every_route(server):
    document = server.get("/docs.json").json()
    assert document["openapi"] == "3.1.0"
    bentomls = {route.path for route in AvexService.to_asgi().routes if isinstance(route, Route)}
    found = bentomls | {endpoint.path for endpoint in ENDPOINTS}
    assert {"/predict", "/v2/models/{name}/infer", "/readyz", "/metrics"} <= found
    assert set(document["paths"]) == found - {f"/v2{path}" for path in REFUSED_PATHS} - {ASSETS}


def test_answers_are_what_openapi_says(server, wav):
    document = server.get("/docs.json").json()
    Draft202012Validator.check_schema({"$defs": document["components"]["schemas"]})

    def check(method, path, status, template=None, **arguments):
        answer = server.client.request(method, path, **arguments)
        assert answer.status_code == status
        responses = document["paths"][template or path][method.lower()]["responses"]
        content = responses.get(str(status), responses["default"])["content"]
        media_type = answer.headers["content-type"].partition(";")[0]
        if media_type == "application/json":
            schema = {**content[media_type]["schema"], "components": document["components"]}
            Draft202012Validator(schema).validate(answer.json())
        else:
            assert media_type in content

    check("POST", "/predict", 200, content=wav)
    check("POST", "/predict", 400, content=b"")
    check("POST", "/embed", 200, files={"audio": wav})
    check("POST", "/classify", 400, json={"embeddings": [[1.0]]})
    for path in ("/", "/v2", "/v2/health/live", "/v2/health/ready", "/livez", "/readyz", "/healthz", "/metrics"):
        check("GET", path, 200)
    check("GET", "/v2/models/tiny", 200, "/v2/models/{name}")
    check("GET", "/v2/models/tiny/versions/1/ready", 200, "/v2/models/{name}/versions/{version}/ready")
    check("GET", "/v2/models/none", 404, "/v2/models/{name}")
    inputs = [{"name": "waveform", "datatype": "FP32", "shape": [1, 1600], "data": [0.5] * 1600}]
    check("POST", "/v2/models/tiny/infer", 200, "/v2/models/{name}/infer", json={"inputs": inputs})
    check("POST", "/v2/models/tiny/infer", 400, "/v2/models/{name}/infer", json={"inputs": []})


def test_the_stages_add_up_on_an_idle_server(tmp_path, slow_bundle):
    """A long recording, so that what is no stage (the arrival of the body, the answer's text) takes little of it."""
    recording = encode(10, 44100, 2, "FLAC")
    with running_server(tmp_path, AVEX_BUNDLE=str(slow_bundle), AVEX_LOG_FORMAT="json", AVEX_THREADS="2") as server:
        server.client.post("/predict", content=recording, headers={"X-Request-ID": "long"}).raise_for_status()
        (line,) = line_of(server, "long")
    total = sum(line[stage] for stage in ("decode_ms", "resample_ms", "queue_ms", "infer_ms"))
    assert 0.8 * line["duration_ms"] <= total <= line["duration_ms"]
