"""JSON that is damaged, deep, wide or of wrong values, also in front of binary tensors."""

import base64
import struct

from avex_serve.annotations.formats import FORMATS
from tests.bundles import DIM, WINDOW
from tests.fuzz import mutations, recordings
from tests.fuzz.mutations import MODEL, OFFLINE

INFER = f"POST /v2/models/{MODEL}/infer".encode()
LENGTH = b"Inference-Header-Content-Length"


def request(random):
    """A request with such a document."""
    match random.randrange(10):
        case 0 | 1:
            return mutations.request(b"POST /tables", mutations.spoilt_json(random, table(random)))
        case 2 | 8 | 9:
            return mutations.request(INFER, mutations.spoilt_json(random, tensors(random)))
        case 3 | 4:
            body, headers = binary(random)
            return mutations.request(INFER, body, headers)
        case 5 | 6:
            rows = [[0.25] * DIM for _ in range(random.choice((1, 2, 30)))]
            asked = {"model": OFFLINE, "embeddings": rows, "threshold": 0.5, "top_k": 1}
            return mutations.request(b"POST /classify", mutations.spoilt_json(random, asked))
    path = random.choice((b"index", b"models/tiny/load", b"models/absent/unload"))
    asked = {"ready": True, "parameters": {"unload_dependents": True, "a": 0.25}}
    return mutations.request(b"POST /v2/repository/" + path, mutations.spoilt_json(random, asked))


def table(random):
    """A document with detections."""
    count = random.choice((0, 1, 3))
    head = base64.b64encode(recordings.audio(random)[:3000]).decode()
    rows = {"label": [0] * count, "start": [0.5] * count, "end": [1.0] * count, "score": [0.25] * count}
    recording = {
        "name": "a.wav",
        "digest": "0" * 64,
        "duration": 1.5,
        "labels": ["x"],
        "head": head,
    }
    asked = {"format": random.choice(list(FORMATS)), "model": MODEL, "recordings": [recording | rows]}
    return asked | {"folder": "/a", "threshold": 0.5, "thresholds": {"x": 0.25}}


def tensors(random):
    """A document of the Open Inference Protocol, with a tensor inside."""
    rows = random.choice((1, 1, 2, 0))
    tensor = {"name": "waveform", "shape": [rows, WINDOW], "datatype": "FP32", "data": [0.25] * (rows * WINDOW)}
    if random.random() < 0.3:
        recording = base64.b64encode(recordings.audio(random)).decode()
        tensor = {"name": "waveform", "shape": [1], "datatype": "BYTES", "data": [recording]}
    outputs = [{"name": "logits", "parameters": {"classification": 2}}, {"name": "scores", "parameters": {}}]
    return {"id": "a", "inputs": [tensor], "outputs": outputs, "parameters": {"overlap": 0.01, "probe": "linear"}}


def binary(random):
    """Body and headers of a document with a tensor in binary after it; the lengths may be wrong."""
    audio = recordings.audio(random)
    raw = random.choice((struct.pack("<f", 0.25) * WINDOW, random.randbytes(4 * WINDOW), _element(audio)))
    kind, shape = ("FP32", [1, WINDOW]) if len(raw) == 4 * WINDOW else ("BYTES", [1])
    tensor = {"name": "waveform", "shape": shape, "datatype": kind, "parameters": {"binary_data_size": len(raw)}}
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    head = mutations.spoilt_json(random, document)
    raw = mutations.spoilt(random, raw) if random.random() < 0.5 else raw
    length = random.choice((len(head),) * 5 + (len(head) - 1, 0, len(head) + len(raw), 10**30, -5, "x"))
    return head + raw, [(LENGTH, str(length).encode())]


def _element(data):
    return len(data).to_bytes(4, "little") + data
