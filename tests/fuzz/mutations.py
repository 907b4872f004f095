"""Requests that no honest client sends: valid ones, spoilt at random."""

import base64
import json
import struct

from tests.bundles import WINDOW
from tests.service.conftest import encode

HOSTILE_NUMBERS = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
RECORDINGS = [
    encode(seconds, rate, channels, container, seed=rate)
    for seconds, rate, channels in ((0.05, 8000, 1), (0.3, 44100, 2))
    for container in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64", "CAF")
    if not (container == "MP3" and rate == 8000)
]
# Offset and length of the fields of a WAV's header: sizes, format, channels, rates, block, bits.
WAV_FIELDS = ((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2), (40, 4))
# In place of a value in JSON.
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf"), "",
    "abc", "\x00", "\ud800", "x" * 5000, "1", [], [[]], [None], [0] * WINDOW, [[0], [0, 0]], {}, {"": {}}, [{}],
    "FP32", "BYTES", "BOOL", "FP64", "INT8", "UINT64", "/etc/passwd", "http://127.0.0.1:9/a.wav", "../../x",
)  # fmt: skip
OPTIONS = ("threshold", "top_k", "overlap", "probe", "model", "version", "output", "audio", "x", "")


def spoilt(random, data):
    """The bytes, damaged in a few places."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 10))):
        if not data:
            return random.randbytes(random.randrange(40))
        match random.randrange(7):
            case 0:  # flip a bit, rather at the beginning, where headers are
                data[_place(random, data)] ^= 1 << random.randrange(8)
            case 1:
                data = data[: _place(random, data)]
            case 2:  # a number that headers are afraid of
                size, place = random.choice((1, 2, 4, 8)), _place(random, data)
                number = random.choice(HOSTILE_NUMBERS) & (256**size - 1)
                data[place : place + size] = number.to_bytes(size, random.choice(("little", "big")))
            case 3:
                place = _place(random, data)
                data[place:place] = random.randbytes(random.randrange(1, 64))
            case 4:
                place = _place(random, data)
                del data[place : place + random.randrange(1, 64)]
            case 5:  # a piece of it once more
                start, place = _place(random, data), _place(random, data)
                data[place:place] = data[start : start + random.randrange(1, 2000)]
            case 6 if data[:4] == b"RIFF" and len(data) >= 44:
                start, size = random.choice(WAV_FIELDS)
                number = random.choice(HOSTILE_NUMBERS) & (256**size - 1)
                data[start : start + size] = number.to_bytes(size, "little")
    return bytes(data)


def audio(random):
    """Something that may have been a recording."""
    if random.random() < 0.1:
        magic = random.choice((b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM", b".snd", b"caff"))
        return magic + random.randbytes(random.randrange(5000))
    return spoilt(random, random.choice(RECORDINGS))


def spoilt_document(random, document):
    """A copy of a JSON document with a few values replaced, removed or added."""
    document = json.loads(json.dumps(document))
    for _ in range(random.choice((1, 1, 2, 3))):
        node = document
        while isinstance(node, dict | list) and node:
            key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if random.random() < 0.4 or not isinstance(node[key], dict | list):
                if random.random() < 0.2:
                    del node[key]
                else:
                    node[key] = random.choice(VALUES)
                break
            node = node[key]
    return document


def tensors(random):
    """A JSON request for inference with a tensor inside."""
    rows = random.choice((1, 1, 2, 0))
    tensor = {"name": "waveform", "shape": [rows, WINDOW], "datatype": "FP32", "data": [0.25] * (rows * WINDOW)}
    if random.random() < 0.3:
        recording = base64.b64encode(audio(random)).decode()
        tensor = {"name": "waveform", "shape": [1], "datatype": "BYTES", "data": [recording]}
    outputs = [{"name": "logits", "parameters": {"classification": 2}}, {"name": "scores", "parameters": {}}]
    return {"id": "a", "inputs": [tensor], "outputs": outputs, "parameters": {"overlap": 0.01, "probe": "linear"}}


def json_bytes(random, document):
    """The document written down, perhaps damaged."""
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    return spoilt(random, text) if random.random() < 0.3 else text


def binary_request(random):
    """Body and headers of a request of the binary tensor extension, with lengths that may lie."""
    raw = random.choice((struct.pack("<f", 0.25) * WINDOW, random.randbytes(4 * WINDOW), _element(audio(random))))
    kind, shape = ("FP32", [1, WINDOW]) if len(raw) == 4 * WINDOW else ("BYTES", [1])
    size = {"binary_data_size": len(raw)}
    tensor = {"name": "waveform", "shape": shape, "datatype": kind, "parameters": size}
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    head = json_bytes(random, spoilt_document(random, document))
    raw = spoilt(random, raw) if random.random() < 0.5 else raw
    length = random.choice(
        (len(head), len(head), len(head), len(head) - 1, 0, len(head) + len(raw), 10**30, -5, "x")
    )
    return head + raw, {"Inference-Header-Content-Length": str(length)}


def form(random):
    """Body and headers of a multipart form that may be none."""
    boundary = b"frontier"
    parts = [(b'name="audio"; filename="a.wav"', audio(random))]
    for _ in range(random.randrange(4)):
        name, value = random.choice(OPTIONS), str(random.choice(VALUES)).encode("utf-8", "replace")
        parts.append((f'name="{name}"'.encode(), value))
    body = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary, *part) for part in parts
    )
    body += b"--" + boundary + b"--\r\n"
    content_type = random.choice(("multipart/form-data; boundary=frontier",) * 5 + CONTENT_TYPES)
    return spoilt(random, body) if random.random() < 0.7 else body, {"content-type": content_type}


CONTENT_TYPES = (
    "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 300,
    'multipart/form-data; boundary="', "multipart/form-data; charset=x; boundary=frontier", "audio/wav",
    "application/json", "text/plain; charset=utf-99", ";", "application/x-www-form-urlencoded",
)  # fmt: skip


def query(random):
    """Options in the query."""
    pairs = [(random.choice(OPTIONS), random.choice(VALUES)) for _ in range(random.randrange(4))]
    return [(name, str(value).encode("utf-8", "replace").decode()) for name, value in pairs]


def headers(random):
    """Headers, one of them odd."""
    odd = (
        {}, {"x-request-id": "a\tb" * 100}, {"content-encoding": "gzip"}, {"accept": b"\xff"},
        {"request-timeout": "nan"},
        {"request-timeout": "-1"}, {"authorization": "Bearer " + "k" * 3000}, {"range": "bytes=5-1"},
        {"traceparent": "00-" + "z" * 32}, {"content-type": random.choice(CONTENT_TYPES)}, {"cookie": "=;=" * 50},
        {"inference-header-content-length": "9" * 30},
    )  # fmt: skip
    return random.choice(odd)


def _element(data):
    return len(data).to_bytes(4, "little") + data


def _place(random, data):
    top = min(64, len(data)) if random.random() < 0.5 else len(data)
    return random.randrange(top)
