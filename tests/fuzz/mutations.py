"""Honest pieces of requests, and ways to damage them."""

import copy
import json

from tests.service.conftest import encode

MODEL, OFFLINE = "tiny", "tiny-offline"  # of audio and of embeddings
HOSTILE_NUMBERS = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
RECORDINGS = [
    encode(seconds, rate, channels, container, seed=rate)
    for seconds, rate, channels in ((0.05, 8000, 1), (0.3, 44100, 2))
    for container in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64", "CAF")
    if not (container == "MP3" and rate == 8000)
]
# Offset and length of the fields of a WAV's header: sizes, format, channels, rates, block, bits.
WAV_FIELDS = ((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2), (40, 4))
# In place of a value in JSON or of an option.
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf"), "",
    "abc", "\x00", "\ud800", "x" * 5000, "1", [], [[]], [None], [0] * 1600, [[0], [0, 0]], {}, {"": {}}, [{}],
    "FP32", "BYTES", "BOOL", "FP64", "INT8", "UINT64", "/etc/passwd", "http://127.0.0.1:9/a.wav", "../../x",
)  # fmt: skip
NUMBERS = (b"1e400", b"-0", b"1E+2", b"0x1", b"01", b".5", b"1.", b"+1", b"NaN", b"9" * 5000)  # in JSON


def request(line, body=b"", headers=()):
    """A whole HTTP request, after which the connection is closed: `line` is b"POST /path", headers are pairs."""
    lines = [b"%b HTTP/1.1" % line, b"Host: a", b"Connection: close", b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, *(b"%b: %b" % pair for pair in headers), b"", body])


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
            case 2:  # a number at the limit of its type
                size, place = random.choice((1, 2, 4, 8)), _place(random, data)
                number = random.choice(HOSTILE_NUMBERS) & (256**size - 1)
                data[place : place + size] = number.to_bytes(size, random.choice(("little", "big")))
            case 3:
                place = _place(random, data)
                data[place:place] = random.randbytes(random.randrange(1, 64))
            case 4:
                place = _place(random, data)
                del data[place : place + random.randrange(1, 64)]
            case 5:  # repeat a piece of it
                start, place = _place(random, data), _place(random, data)
                data[place:place] = data[start : start + random.randrange(1, 2000)]
            case 6 if data[:4] == b"RIFF" and len(data) >= 44:
                start, size = random.choice(WAV_FIELDS)
                number = random.choice(HOSTILE_NUMBERS) & (256**size - 1)
                data[start : start + size] = number.to_bytes(size, "little")
    return bytes(data)


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
                    node[key] = copy.deepcopy(random.choice(VALUES))
                break
            node = node[key]
    return document


def spoilt_json(random, document):
    """The text of a JSON document: with values that are replaced, bytes that are damaged, or both."""
    if random.random() < 0.8:
        document = spoilt_document(random, document)
    text = json.dumps(document).encode()
    match random.randrange(10):
        case 0:
            return spoilt(random, text)
        case 1:  # another spelling of a number
            return text.replace(b"0.25", random.choice(NUMBERS), random.choice((1, -1)))
        case 2:  # deep, wide or odd text inside of it
            odd = random.choice((
                b"[" * 9000 + b"]" * 9000, b'{"a":' * 3000, b"[" * 70 + b"0" + b"]" * 70, b'"\\ud800"', b'"\xff"',
                b'"\\u0000\\n\x00"', b"[[1,2],[3]]", b'["a",1]', b"[1,,2]", b"[" + b"{}," * 9000 + b"{}]",
            ))  # fmt: skip
            place = text.find(b": ", random.randrange(len(text))) + 2
            return text[:place] + odd + text[random.choice((place, text.find(b",", place))) :]
        case 3:
            utf16 = text.decode().encode("utf-16")
            return random.choice((b"\xef\xbb\xbf" + text, text + text, text + b"\x00", utf16))
    return text


def _place(random, data):
    top = min(64, len(data)) if random.random() < 0.5 else len(data)
    return random.randrange(top)
