"""Bodies and messages of requests."""

import base64
import json
from urllib.parse import urlencode

from tritonclient.grpc import service_pb2

from .asking import Grpc, Http
from .sounds import element

INFER = "/v2/models/tiny/infer"


def get(path, **rest):
    return Http("GET", path, **rest)


def post(path, body=b"", **rest):
    return Http("POST", path, body, **rest)


def posts(path, body, *options, **rest):
    """A request for each of the options: a dict or a list of pairs in the query."""
    return [post(f"{path}?{urlencode(each)}" if each else path, body, **rest) for each in options]


def form(path, parts, note, boundary="frontier", **rest):
    """A multipart form of parts, each (what stands in its Content-Disposition, other headers, content)."""
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n{others}\r\n".encode() + content + b"\r\n"
        for disposition, others, content in parts
    )
    body += f"--{boundary}--\r\n".encode()
    return malformed_form(path, body, note, boundary, **rest)


def malformed_form(path, body, note, boundary="frontier", **rest):
    kind = "multipart/form-data" if boundary is None else f"multipart/form-data; boundary={boundary}"
    return post(path, body, headers=(("Content-Type", kind), *rest.pop("headers", ())), note=f"form {note}", **rest)


def file(data, name="audio", filename="a.wav", others="Content-Type: audio/wav\r\n"):
    return (f'name="{name}"; filename="{filename}"', others, data)


def field(name, text):
    return (f'name="{name}"', "", text.encode())


# The Open Inference Protocol over HTTP


def tensor(array, name="waveform", datatype="FP32", flat=True, **changes):
    """An input as JSON; `changes` replace fields, or remove them by None."""
    data = array.ravel().tolist() if flat else array.tolist()
    made = {"name": name, "shape": list(array.shape), "datatype": datatype, "data": data, **changes}
    return {key: value for key, value in made.items() if value is not None}


def recordings(*audio, name="waveform", **changes):
    """Recordings as an input in JSON."""
    data = [base64.b64encode(each).decode() for each in audio]
    return {"name": name, "shape": [len(audio)], "datatype": "BYTES", "data": data, **changes}


def output(name, **parameters):
    return {"name": name, "parameters": parameters} if parameters else {"name": name}


def infer(*inputs, note, path=INFER, **document):
    """Everything as JSON; text among the document's fields stands for itself."""
    return post(path, _dumped({**document, "inputs": list(inputs)}), note=note)


def binary(*inputs, note, path=INFER, length=None, extra=b"", **document):
    """Tensors in binary after the JSON: inputs are (the tensor without data, bytes) or tensors with data."""
    tensors, raw = [], b""
    for each in inputs:
        if isinstance(each, tuple):
            each, data = each
            each = {"parameters": {"binary_data_size": len(data)}} | each
            raw += data
        tensors.append(each)
    head = _dumped({**document, "inputs": tensors})
    headers = (("Inference-Header-Content-Length", str(len(head)) if length is None else length),)
    return post(path, head + raw + extra, note=f"binary {note}", headers=headers)


def raw_tensor(array, name="waveform", **changes):
    """An FP32 or BOOL tensor for `binary`."""
    datatype, dtype = ("BOOL", "?") if array.dtype == bool else ("FP32", "<f4")
    made = {"name": name, "shape": list(array.shape), "datatype": datatype, **changes}
    return made, array.astype(dtype).tobytes()


def raw_recordings(*audio, name="waveform", **changes):
    made = {"name": name, "shape": [len(audio)], "datatype": "BYTES", **changes}
    return made, b"".join(map(element, audio))


def _dumped(document):
    return json.dumps({"id": "7", **document} if "id" not in document else _without(document)).encode()


def _without(document):
    return {key: value for key, value in document.items() if value is not None}


# The same over gRPC


def rpc(method, note="", message=None, **rest):
    """A call of the protocol."""
    return Grpc(method, dumped(message) if message is not None else b"", note=note, **rest)


def dumped(message):
    return message.SerializeToString(deterministic=True)


def message(kind, **fields):
    """A request of that kind."""
    return getattr(service_pb2, f"{kind}Request")(**fields)


def message_tensor(array, name="waveform", datatype="FP32", typed=False, **fields):
    """An input and its raw content, None if it is in typed contents."""
    made = service_pb2.ModelInferRequest.InferInputTensor(
        **{"name": name, "datatype": datatype, "shape": array.shape, **fields}
    )
    if not typed:
        return made, array.astype("<f4" if datatype == "FP32" else "?").tobytes()
    contents = made.contents.fp32_contents if datatype == "FP32" else made.contents.bool_contents
    contents.extend(array.ravel().tolist())
    return made, None


def message_recordings(*audio, name="waveform", typed=False, **fields):
    made = service_pb2.ModelInferRequest.InferInputTensor(
        **{"name": name, "datatype": "BYTES", "shape": [len(audio)], **fields}
    )
    if not typed:
        return made, b"".join(map(element, audio))
    made.contents.bytes_contents.extend(audio)
    return made, None


def infer_message(*inputs, model="tiny", outputs=(), parameters=None, raw=None, **fields):
    """A ModelInferRequest; outputs are names, or pairs of a name and parameters."""
    request = service_pb2.ModelInferRequest(model_name=model, **fields)
    for made, content in inputs:
        request.inputs.append(made)
        if content is not None and raw is None:
            request.raw_input_contents.append(content)
    request.raw_input_contents.extend(raw or ())
    for each in outputs:
        name, chosen = (each, {}) if isinstance(each, str) else each
        _set(request.outputs.add(name=name).parameters, chosen)
    _set(request.parameters, parameters or {})
    return request


def model_infer(*inputs, note, metadata=(), situation="", lossy=False, **fields):
    """A call of ModelInfer; other fields as of `infer_message`."""
    request = infer_message(*inputs, **fields)
    return rpc("ModelInfer", note, request, metadata=metadata, situation=situation, lossy=lossy)


def parameter(value):
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return service_pb2.InferParameter(**{kinds[type(value)]: value})


def _set(parameters, values):
    for name, value in values.items():
        parameters[name].CopyFrom(parameter(value))
