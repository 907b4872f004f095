"""How a request is sent, and what is kept of its answer: the record, and the wording apart from it."""

import base64
import contextlib
import http.client
import json
import re
import socket
import time
from dataclasses import dataclass

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from avex_serve.service.grpc.messages import message_class

from .servers import HOST, PATIENCE, normalised

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
WORDS = "…"  # stands in a record where the wording was
JSON_LENGTH = "inference-header-content-length"
UNKEPT = {"date", "content-length", "server", "etag"}  # headers; the last is a digest of the content
GENERATED = re.compile(r"[0-9a-f]{32}")  # an id of a request that the client didn't give
SETTLE = 0.3  # seconds until what was answered has been counted


@dataclass(frozen=True)
class Http:
    """A request over HTTP. Its name is what is kept: change it and it is another request.

    Attributes:
        method, path, headers, body: as they are sent; the length of the body is sent unless a header says otherwise.
        note: tells it from others of the same method and path.
        keep: what is kept of the body, see `_KEPT`.
        situation: of the server, see `servers.situation`.
        lossy: the recording was decoded in a way that differs by processor.
        raw: sent in place of all that.
        worded: whether the wording is always the same.
    """

    method: str
    path: str
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    note: str = ""
    keep: str = "text"
    situation: str = ""
    lossy: bool = False
    raw: bytes | None = None
    worded: bool = True

    @property
    def name(self):
        return " | ".join(filter(None, ["HTTP", f"{self.method} {self.path}", self.note, self.situation]))

    def sent(self):
        if self.raw is not None:
            return self.raw
        headers = [("Host", HOST), *self.headers]
        names = {name.lower() for name, _ in headers}
        if self.body is not None and not names & {"content-length", "transfer-encoding"}:
            headers.append(("Content-Length", str(len(self.body))))
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1") + (self.body or b"")

    def ask(self, asked):
        return asked.http(self)


@dataclass(frozen=True)
class Grpc:
    """A call over gRPC.

    Attributes:
        method: with or without the name of the service, by default that of the protocol.
        data: the message; None: the call ends without one.
        note: tells it from others of the same method.
        metadata: of the call.
        timeout: what the client tells of its patience, in seconds.
        kind: "call", "stream" for a call of several messages both ways, "watch" for the first answer of a stream,
            "parts" for all answers of one, "silent" for a call whose message never comes.
        keep: "code" if nothing else is kept, otherwise "text".
        situation, lossy: see `Http`.
    """

    method: str
    data: bytes | None = b""
    note: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    timeout: float = PATIENCE
    kind: str = "call"
    keep: str = "text"
    situation: str = ""
    lossy: bool = False

    @property
    def name(self):
        return " | ".join(filter(None, ["gRPC", self.method, self.note, self.situation]))

    def ask(self, asked):
        return asked.grpc(self)


class Asked:
    """A server that is being asked, with its files in a folder."""

    def __init__(self, server, folder):
        self._server = server
        self._folder = folder
        self._channel = grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)])

    def close(self):
        self._channel.close()

    def http(self, request):
        """The record of the answer, and its wording or None."""
        if request.keep == "metrics":
            time.sleep(SETTLE)
        address = ("127.0.0.1", self._server.http_port)
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            with contextlib.suppress(ConnectionError):  # refused before all was sent
                connection.sendall(request.sent())
            response = http.client.HTTPResponse(connection, method=request.method)
            response.begin()
            body = response.read()
        record = {"status": response.status, "headers": _headers(response.getheaders())}
        if response.status == 101 or request.keep == "nothing":
            return record, None
        kept, words = _KEPT[request.keep](self, response, body)
        record.update(kept)
        return record, words if request.worded else None

    def grpc(self, call):
        """The record of the answer, and its wording or None."""
        method = call.method if "/" in call.method else f"{SERVICE}/{call.method}"
        never = _Never()
        messages = never if call.kind == "silent" else iter(() if call.data is None else (call.data,))
        arguments = {"timeout": call.timeout, "metadata": call.metadata}
        try:
            if call.kind == "parts":
                running = self._channel.stream_stream(f"/{method}")(messages, **arguments)
                parts = [_message(method, each) for each in running]
                words = [self._normalised(_cut(part, "error_message")) for part in parts if "error_message" in part]
                return {"code": "OK", "metadata": _metadata(running), "answers": parts}, words or None
            if call.kind in ("watch", "stream"):
                running = self._channel.stream_stream(f"/{method}")(messages, **arguments)
                answer = next(running)
                running.cancel()
            else:
                answer, running = self._channel.stream_unary(f"/{method}").with_call(messages, **arguments)
        except grpc.RpcError as error:
            record = {"code": error.code().name}
            if call.keep == "code":
                return record, None
            details = self._normalised(error.details() or "")
            return {**record, "metadata": _metadata(error), "details": details and WORDS}, details or None
        finally:
            never.end()
        message = _message(method, answer)
        models = message.get("models", [])
        words = [self._normalised(_cut(model, "reason")) for model in models if "reason" in model]
        return {"code": "OK", "metadata": _metadata(running), "answer": message}, words or None

    def _normalised(self, text):
        return normalised(text, self._server, self._folder)

    # What is kept of a body

    def _text(self, response, body):
        if body and (length := response.getheader(JSON_LENGTH)) is not None:
            head, rest = body[: int(length)].decode(), body[int(length) :]
            return {"json": head, "tensors": _split_tensors(head, rest)}, None
        text = self._normalised(body.decode())
        if text and response.getheader("content-type", "").startswith("application/json"):
            return _without_words(text)
        if response.getheader("content-type", "").startswith("application/x-ndjson"):
            lines = [json.loads(line) for line in text.splitlines()]
            words = [line["error"] for line in lines if "error" in line]
            for each in words:
                text = _replaced(text, each)
            return {"json": f"[{','.join(text.splitlines())}]"}, words or None
        if response.status >= 400 or "<html" in text:
            return {"body": text and WORDS}, text or None
        return {"body": text}, None

    def _metrics(self, response, body):
        """The series without what they count; a histogram's buckets once."""
        series, words = {}, {}
        for family in text_string_to_metric_families(body.decode()):
            words[family.name] = family.documentation
            labels, buckets = set(), []
            for sample in family.samples:
                rest = {name: value for name, value in sample.labels.items() if name != "le"}
                if "digest" in rest:
                    rest["digest"] = "DIGEST"  # of a bundle that is made for the recording
                labels.add(json.dumps([sample.name.removesuffix("_bucket"), dict(sorted(rest.items()))]))
                if (bucket := sample.labels.get("le")) and bucket not in buckets:
                    buckets.append(bucket)
            series[family.name] = [family.type, [json.loads(each) for each in sorted(labels)], buckets]
        return {"series": dict(sorted(series.items()))}, dict(sorted(words.items()))

    def _openapi(self, response, body):
        """Routes, parameters, statuses and components of the OpenAPI document."""
        document = json.loads(self._normalised(body.decode()))
        words = {}
        _cut_words(document, words)
        routes = {
            f"{method} {path}": {
                "parameters": [
                    f"{each['name']} in {each['in']}{' required' * each.get('required', False)}"
                    for each in operation.get("parameters", [])
                ],
                "takes": _contents(operation.get("requestBody", {})),
                "answers": {status: _contents(answer) for status, answer in operation["responses"].items()},
            }
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        }
        components = {
            name: {"properties": list(schema.get("properties", {})), "required": schema.get("required", [])}
            for name, schema in sorted(document["components"]["schemas"].items())
        }
        rest = {name: value for name, value in document.items() if name not in ("paths", "components")}
        rest["info"].pop("version", None)
        return {"routes": routes, "components": components, "rest": rest}, words

    def _schema(self, response, body):
        """What BentoML's client needs, without its descriptions."""
        document = json.loads(self._normalised(body.decode()))
        words = {}
        _cut_words(document, words)
        return {"document": document}, words


_KEPT = {
    "text": Asked._text,
    "metrics": Asked._metrics,
    "openapi": Asked._openapi,
    "schema": Asked._schema,
}


class _Never:
    """An iterator of messages of which none comes until `end`."""

    def __init__(self):
        self._ended = False

    def __iter__(self):
        return self

    def __next__(self):
        while not self._ended:
            time.sleep(0.02)
        raise StopIteration

    def end(self):
        self._ended = True


def _headers(pairs):
    return sorted([name, _header(name, value)] for name, value in ((each.lower(), value) for each, value in pairs)
                  if name not in UNKEPT)  # fmt: skip


def _header(name, value):
    if name == "x-request-id" and GENERATED.fullmatch(value):
        return "GENERATED"
    if name == "allow":  # a set, whose order is another one in each process
        return ", ".join(sorted(value.split(", ")))
    return value


def _metadata(call):
    return [*_headers(call.initial_metadata() or ()), *(["trailing", *each] for each in _headers(_trailing(call)))]


def _trailing(call):
    return [(key, value) for key, value in call.trailing_metadata() or () if isinstance(value, str)]


def _split_tensors(head, rest):
    """The binary tensors after the JSON, each with its type: the rest is kept if there is any."""
    tensors = []
    for output in json.loads(head)["outputs"]:
        if (size := output.get("parameters", {}).get("binary_data_size")) is not None:
            tensors.append([output["datatype"], base64.b64encode(rest[:size]).decode()])
            rest = rest[size:]
    return [*tensors, *([["rest", base64.b64encode(rest).decode()]] if rest else [])]


def _without_words(text):
    """A JSON body as exact text, but for the messages in it."""
    document, words = json.loads(text), []
    if isinstance(document, dict) and list(document) == ["error"] and isinstance(document["error"], str):
        words = document["error"]
        text = _replaced(text, words)
    elif isinstance(document, list):
        words = [line["reason"] for line in document if isinstance(line, dict) and line.get("reason")]
        for each in words:
            text = _replaced(text, each)
    return {"json": text}, words or None


def _replaced(text, words):
    written = json.dumps(words, ensure_ascii=False)
    assert written in text, text
    return text.replace(written, json.dumps(WORDS, ensure_ascii=False), 1)


def _cut(document, name):
    words, document[name] = document[name], WORDS
    return words


def _cut_words(node, words, path=""):
    """Move summaries and descriptions out of an OpenAPI document or a JSON schema."""
    if isinstance(node, list):
        for index, each in enumerate(node):
            _cut_words(each, words, f"{path}/{index}")
    elif isinstance(node, dict):
        for name in list(node):
            if name in ("summary", "description") and isinstance(node[name], str):
                words[f"{path}/{name}"] = _cut(node, name)
            else:
                _cut_words(node[name], words, f"{path}/{name}")


def _contents(part):
    return {kind: content["schema"].get("$ref", "") for kind, content in part.get("content", {}).items()}


def _message(method, data):
    """The answer as a dict whose raw tensors are kept in base64."""
    service, _, name = method.rpartition("/")
    if service == HEALTH:
        message = health_pb2.HealthCheckResponse.FromString(data)
    else:
        message = getattr(service_pb2, f"{name}Response").FromString(data)
    unknown = {field.field_number for field in UnknownFieldSet(message)}
    if name == "ModelMetadata":  # `parameters` is MLServer's; Triton's clients skip it
        unknown -= {6}
        message = message_class("ModelMetadataResponse").FromString(data)
    assert not unknown, "the answer has fields that Triton's client doesn't know"
    document = MessageToDict(message, preserving_proto_field_name=True)
    if name == "ModelStreamInfer":
        document |= document.pop("infer_response", {})
    if name == "ServerMetadata":
        document["version"] = "VERSION"
    for parameters in (document, document.get("config", {}), *document.get("outputs", [])):
        if "parameters" in parameters:
            parameters["parameters"] = dict(sorted(parameters["parameters"].items()))
    if "raw_output_contents" in document:
        kinds = [output["datatype"] for output in document["outputs"]]
        document["raw_output_contents"] = [
            list(pair) for pair in zip(kinds, document["raw_output_contents"], strict=True)
        ]
    return document
