"""The table: every request by the server that is asked, in the order in which it is sent."""

import json
import struct

import numpy as np

from tests.bundles import DIM, WINDOW

from .asking import HEALTH, Grpc, Http
from .making import (
    INFER,
    binary,
    dumped,
    field,
    file,
    form,
    get,
    infer,
    infer_message,
    malformed_form,
    message,
    message_recordings,
    message_tensor,
    model_infer,
    output,
    parameter,
    post,
    posts,
    raw_recordings,
    raw_tensor,
    recordings,
    rpc,
    tensor,
)
from .servers import KEYS, MAX_BODY
from .sounds import element, embeddings, encoded, mask, patched, silence, windows

WAV = encoded(0.25)  # two windows and a half
ONE = windows(1)
TWO = windows(2)
EMBEDDINGS = embeddings()


def as_json(value):
    return json.dumps(value).encode()


# What is about the service itself

PAGES = [
    get("/"),
    get("/", headers=(("Accept", "text/html,application/xhtml+xml;q=0.9"),), note="browser"),
    get("/", headers=(("Accept", "text/html, application/json"),), note="either"),
    get("/?x=1"),
    *(Http(method, "/") for method in ("HEAD", "POST", "OPTIONS", "DELETE")),
    get("/docs.json", keep="openapi"),
    Http("HEAD", "/docs.json"),
    post("/docs.json"),
    get("/schema.json", keep="schema"),
    post("/schema.json"),
    get("/static_content/main.js", keep="nothing"),
    *(
        Http(method, path)
        for path in ("/livez", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2")
        for method in ("GET", "HEAD", "POST")
    ),
    Http("OPTIONS", "/v2"),
    *(
        get(path)
        for path in ("/v2/", "/v2/health", "/v2/nothing", "/v2/models", "/nothing", "/favicon.ico", "/livez/")
    ),
    *(
        get(path)
        for path in ("//v2", "/V2", "/v2%0A", "/livez%0A", "/%76%32", "/predict/../v2", "/v2;x", "/v2?x=%FF")
    ),
    get("http://avex.test/v2"),
    get("http://other.test/nothing"),
    Http("OPTIONS", "*"),
    *(
        get("/v2", headers=(("X-Request-Id", identity),), note=note)
        for note, identity in (
            ("id", "my-id:1/a+b=@x.y_z"),
            ("id of 128", "i" * 128),
            ("id of 129", "i" * 129),
            ("id with a blank", "my id"),
            ("id not ASCII", "sch\xf6n"),
            ("id empty", ""),
        )
    ),
    get("/nothing", headers=(("X-Request-Id", "mine"),), note="id"),
    get("/v2", headers=(("Origin", "http://elsewhere.test"),), note="of another origin"),
    Http(
        "OPTIONS",
        "/predict",
        headers=(("Origin", "http://elsewhere.test"), ("Access-Control-Request-Method", "POST")),
        note="preflight",
    ),
    get("/v2", headers=(("Accept-Encoding", "gzip"),), note="gzip"),
]
LAST_PAGES = [
    Http("HEAD", "/metrics"),
    post("/metrics"),
    get("/metrics", keep="metrics"),
]

HEAD_SIZE = 2**16
HEADS = [
    Http("raw", "header too large", raw=b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * HEAD_SIZE + b"\r\n\r\n"),
    Http("raw", "header without end", raw=b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * HEAD_SIZE),
    Http("raw", "path too large", raw=b"GET /" + b"a" * HEAD_SIZE + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    Http("raw", "large header", raw=b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 60_000 + b"\r\n\r\n"),
    Http("raw", "not HTTP", raw=b"nonsense\r\n\r\n"),
    Http("raw", "HTTP/1.0", raw=b"GET /v2 HTTP/1.0\r\n\r\n"),
    Http("raw", "without Host", raw=b"GET /v2 HTTP/1.1\r\n\r\n"),
    Http("raw", "to be closed", raw=b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    Http("raw", "bad length", raw=b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n"),
    Http(
        "raw",
        "expecting to continue",
        raw=b"POST /predict?top_k=1 HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        % len(WAV)
        + WAV,
    ),
]

# Recordings

METHODS = [
    *(Http(method, "/predict") for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS")),
    *(Http("GET", path) for path in ("/predict_all", "/embed", "/classify", INFER)),
    *(
        post(path, WAV)
        for path in ("/predict/", "//predict", "/predict%0A", "/%70redict", "/PREDICT", "/embed/../predict")
    ),
    *(post(path, WAV) for path in ("/predict?", "/predict;top_k=1", "/predict/submit", "/embed%0a", "/api/predict")),
]
FORMS = [
    *posts("/predict", WAV, *({"hop": each} for each in ("0.05", "0.1", "0", "-1", "0.2", "x", ""))),
    *posts("/predict", WAV, {"hop": "0.05", "overlap": "0.05"}, {"hop": "0.05", "overlap": "0"}),
    *posts(
        "/predict", WAV, *({"label": each} for each in ("robin", '["robin", "chiffchaff"]', "wren", "[", "", "null"))
    ),
    *posts("/predict", WAV, [("label", "robin"), ("label", "chiffchaff"), ("top_k", "1")]),
    *posts("/predict", WAV, *({"merge": each} for each in ("0", "1", "-1", "nan", "x", ""))),
    *posts("/predict", WAV, *({"merge": "0", "merge_score": each} for each in ("max", "mean", "median", ""))),
    *posts("/predict_all", WAV, {"hop": "0.05", "merge": "0", "label": "robin"}),
    *posts("/embed", WAV, {"hop": "0.05"}, {"merge": "0"}),
    *posts(
        "/predict",
        WAV,
        *({"format": each} for each in ("json", "stream", "audacity", "raven", "", "xlsx", "camtrap-dp")),
    ),
    *posts(
        "/predict", WAV, *({"format": "birdnet", "top_k": "1", **each} for each in ({}, {"file": "/season/a,b.wav"}))
    ),
    *posts("/predict", WAV, {"format": "kaleidoscope", "file": "a.wav", "top_k": "1"}),
    *posts("/predict", WAV, {"format": "raven", "timezone": "Mars"}, [("format", "raven"), ("format", "csv")]),
    *posts(
        "/predict", WAV, {"format": "stream", "merge": "0", "hop": "0.05"}, {"format": "stream", "threshold": "2"}
    ),
    post("/predict?format=stream", b"nothing", note="no audio"),
    post("/predict?top_k=1", WAV, headers=(("Accept", "application/x-ndjson"),), note="Accept"),
    post("/predict?top_k=1", WAV, headers=(("Accept", "text/tab-separated-values"),), note="Accept a table"),
    post("/predict?top_k=1", WAV, headers=(("Accept", "text/html"),), note="Accept a page"),
    post("/predict_all?format=stream", WAV),
]
OPTIONS = [
    *({"threshold": each} for each in ("0.5", "0", "-1", "1", "1e-1", " 0.5 ", "+.5", '"0.5"', "", "null")),
    *({"threshold": each} for each in ("abc", "nan", "inf", "-inf", "[1]", "true", "0,5", '"', '""', "1e400")),
    *({"top_k": each} for each in ("1", "2", "100", '"2"', "2.0", " 2", "1_0", "", "null")),
    *({"top_k": each} for each in ("0", "-3", "1.5", "abc", "nan", "9" * 18, "true")),
    *({"overlap": each} for each in ("0", "0.05", "0.09", "1e-9", '"0.05"', "", "null", "-0.0")),
    *({"overlap": each} for each in ("0.1", "-0.01", "nan", "inf", "abc")),
    *({"probe": each} for each in ("linear", '"linear"', "", "null", "Linear", "nothing", '"nothing"', "Zaunkönig")),
    *({"model": each} for each in ("tiny", '"tiny"', "", "null", "other", "n" * 300)),
    *({"version": each} for each in ("1", '"1"', "", "null", "2", "01", "1.0")),
    {"topk": "1"},
    {"audio": "x"},
    {"output": "embedding"},
    {"": "1"},
    [("top_k", "1"), ("top_k", "1")],
    [("top_k", "1"), ("top_k", "")],
    {"threshold": "0.45", "top_k": "2", "overlap": "0.05", "probe": "linear", "model": "tiny", "version": "1"},
    {"threshold": "abc", "top_k": "abc"},
]
PREDICT = [
    post("/predict", WAV),
    *posts("/predict", WAV, *OPTIONS),
    *FORMS,
    post("/predict?top_k=1&top%5Fk=2", WAV),
    post("/predict?top_k", WAV),
    post("/predict?probe=%FF", WAV),
    post("/predict_all", WAV),
    *posts("/predict_all", WAV, {"top_k": "1"}, {"threshold": "0"}, {"overlap": "0.05"}, {"probe": "linear"}),
    *posts("/predict_all", WAV, {"model": "tiny", "version": "1"}, {"model": "other"}, {"version": "2"}),
    post("/embed", WAV),
    *posts("/embed", WAV, {"overlap": "0.05"}, {"overlap": "x"}, {"overlap": "0.1"}, {"output": "embedding"}),
    *posts("/embed", WAV, {"output": ""}, {"output": '"embedding"'}, {"output": "logits"}, {"top_k": "1"}),
    *posts("/embed", WAV, {"model": "other"}, {"version": "2"}),
]
SENT = [
    *(
        post("/predict?top_k=1", WAV, headers=(("Content-Type", kind),), note=kind)
        for kind in ("audio/wav", "application/json", "application/x-www-form-urlencoded", "text/plain", "nonsense")
    ),
    *(
        post("/predict?top_k=1", WAV, headers=(("Content-Encoding", kind),), note=f"encoding {kind}")
        for kind in ("gzip", "identity", "", "GZIP", "Identity")
    ),
    post(INFER, b"{}", headers=(("Content-Encoding", "gzip"),), note="encoding gzip"),
    post("/classify", b"{}", headers=(("Content-Encoding", "gzip"),), note="encoding gzip"),
    post("/v2/repository/index", b"{}", headers=(("Content-Encoding", "gzip"),), note="encoding gzip"),
    form("/predict?top_k=1", [file(WAV)], "encoding gzip", headers=(("Content-Encoding", "gzip"),)),
    post(
        "/predict?top_k=1",
        b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (WAV[:100], WAV[100:])) + b"0\r\n\r\n",
        headers=(("Transfer-Encoding", "chunked"),),
        note="chunked",
    ),
    *(
        post(
            "/predict?top_k=1",
            WAV,
            headers=(("Request-Timeout", seconds),),
            note=f"timeout {seconds}",
            worded=worded,
        )
        for seconds, worded in (
            *((each, True) for each in ("60", "1e3", " 60 ", "", "abc", "-1", "0", "nan", "inf", "1s")),
            ("0.000001", False),
        )
    ),
    get("/livez", headers=(("Request-Timeout", "abc"),), note="timeout abc"),
    get("/nothing", headers=(("Request-Timeout", "abc"),), note="timeout abc"),
]
PART = b'--frontier\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n' + WAV
JSON_OPTIONS = [
    field(n, t) for n, t in (("threshold", "null"), ("top_k", "2"), ("overlap", "0.05"), ("probe", "null"))
]
FORMS = [
    form("/predict", [file(WAV)], "file"),
    form("/predict", [file(WAV, others="")], "file without type"),
    form("/predict", [file(WAV, filename="")], "file without name"),
    form("/predict", [file(WAV, filename="Zaunk\u00f6nig.wav")], "file with a name in UTF-8"),
    form("/predict", [field("top_k", "1"), file(WAV), field("overlap", "0.05")], "options around the file"),
    form("/predict", [file(WAV), *JSON_OPTIONS], "options as JSON"),
    form("/predict", [file(WAV), field("probe", '"[1]"')], "probe that is none as JSON"),
    form("/predict", [file(WAV), field("threshold", ""), field("model", '"tiny"')], "options empty and quoted"),
    form("/predict?top_k=1", [file(WAV), field("overlap", "0.05")], "options in both"),
    form("/predict?top_k=1", [file(WAV), field("top_k", "1")], "option in both"),
    form("/predict", [file(WAV), field("top_k", "1"), field("top_k", "2")], "option twice"),
    form("/predict", [file(WAV), field("topk", "1")], "unknown option"),
    form("/predict", [file(WAV), field("threshold", "abc")], "bad option"),
    form("/predict", [field("audio", "x")], "audio as text"),
    form("/predict", [file(WAV, name="file")], "file of another name"),
    form("/predict", [file(WAV), file(WAV)], "audio twice"),
    form("/predict", [file(WAV), file(b"1", name="top_k")], "option as file"),
    form("/predict", [file(b"")], "empty file"),
    form("/predict", [file(b"no audio")], "file that is no audio"),
    form("/predict", [field("top_k", "1")], "no file"),
    form("/predict", [], "no parts"),
    form("/predict", [file(WAV), *(field(f"f{index}", "1") for index in range(17))], "many fields"),
    form("/predict", [file(WAV), field("top_k", "1" * (2**16 + 1))], "large field"),
    form("/predict_all", [file(WAV), field("top_k", "1")], "file"),
    form("/embed", [file(WAV), field("overlap", "0.05")], "file"),
    form("/embed", [file(WAV), field("top_k", "1")], "unknown option"),
    malformed_form("/predict", PART + b"\r\n--frontier--\r\n", "no boundary", None),
    malformed_form("/predict", PART + b"\r\n--frontier--\r\n", "another boundary", "other"),
    malformed_form("/predict", b"", "empty"),
    malformed_form("/predict", b"\x00\xff garbage", "garbage"),
    malformed_form("/predict", PART, "unfinished"),
    malformed_form(
        "/predict", b"--frontier\r\nContent-Disposition: form-data\r\n\r\nx\r\n--frontier--\r\n", "no name"
    ),
    malformed_form("/predict", b"--frontier\r\n\x00: \xff\r\n\r\nx\r\n--frontier--\r\n", "bad header"),
    form("/classify", [file(WAV)], "file"),
    post(
        "/predict?top_k=1",
        PART + b"\r\n--frontier--\r\n",
        headers=(("Content-Type", "Multipart/Form-Data; boundary=frontier"),),
        note="form in another case",
    ),
]
CONTAINERS = [
    post("/predict?threshold=0", data, note=note, lossy=note.startswith(("OGG", "MP3", "resampled")))
    for note, data in (
        *((f"WAV {rate}", encoded(0.25, rate)) for rate in (8000, 22050, 44100, 48000, 96000)),
        *((f"WAV {kind}", encoded(0.25, subtype=kind)) for kind in ("PCM_U8", "PCM_24", "FLOAT", "DOUBLE", "ULAW")),
        ("WAV stereo", encoded(0.25, 44100, 2)),
        ("WAV of 6 channels", encoded(0.25, 16000, 6)),
        ("WAV of one sample", encoded(1 / 16000)),
        ("WAV of less than a window", encoded(0.05)),
        ("WAV of a window", encoded(0.1)),
        ("WAV of a sample more", encoded(1601 / 16000)),
        ("WAV of 2 s", encoded(2)),
        ("FLAC", encoded(0.25, container="FLAC")),
        ("FLAC stereo 48000", encoded(0.25, 48000, 2, "FLAC")),
        ("OGG", encoded(0.25, container="OGG")),
        ("OGG stereo 44100", encoded(0.5, 44100, 2, "OGG")),
        ("MP3", encoded(0.5, container="MP3")),
        ("MP3 48000", encoded(0.5, 48000, 1, "MP3")),
        ("AIFF", encoded(0.25, container="AIFF")),
        ("AU", encoded(0.25, container="AU")),
        ("CAF", encoded(0.25, container="CAF")),
        ("WAV and more bytes", WAV + b"more"),
        ("WAV cut in its samples", WAV[:1001]),
        ("silence of 1 s", silence(1)),
    )
]  # fmt: skip
FLOATS = encoded(0.1, subtype="FLOAT")
BROKEN = {
    "empty": b"",
    "text": b"this is no audio",
    "a URL": b"http://127.0.0.1:9/a.wav",
    "a path": b"/etc/passwd",
    "cut header": WAV[:20],
    "no samples": encoded(0),
    "rate 0": patched(WAV, 24, bytes(4)),
    "rate 99": patched(WAV, 24, struct.pack("<I", 99)),
    "rate 2**31 - 1": patched(WAV, 24, struct.pack("<I", 2**31 - 1)),
    "NaN": FLOATS[:-4] + struct.pack("<f", np.nan),
    "samples of 3e38": FLOATS[:-6400] + np.full(1600, 3e38, "<f4").tobytes(),
    "cut FLAC": encoded(0.25, container="FLAC")[:60],
    "cut OGG": encoded(0.25, container="OGG")[:60],
}
BAD_AUDIO = [
    *(post("/predict", data, note=note) for note, data in BROKEN.items()),
    *(post("/embed", BROKEN[note], note=note) for note in ("empty", "text", "NaN")),
    *(binary(raw_recordings(BROKEN[note]), note=note) for note in ("empty", "text", "NaN", "no samples")),
]

# The Open Inference Protocol over HTTP

MODELS = [
    *(
        get(f"/v2/models/{path}")
        for path in (
            *("tiny", "tiny/ready", "tiny/config", "tiny/versions/1", "tiny/versions/1/ready"),
            *("tiny/versions/1/config", "tiny/", "tiny/versions", "tiny/nothing", "ti%6Ey", "tiny%2Fready"),
            *("other", "other/ready", "other/config", "t%C3%A9", "%20", "n" * 300),
            *("tiny/versions/2", "tiny/versions/2/ready", "tiny/versions/2/config", "tiny/versions/01"),
        )
    ),
    get("/v2//models/tiny"),
    Http("HEAD", "/v2/models/tiny"),
    post("/v2/models/tiny"),
    Http("DELETE", "/v2/models/tiny/ready"),
    Http("OPTIONS", INFER),
    *(
        Http(method, f"/v2/{path}", b"" if method == "POST" else None)
        for method in ("GET", "POST")
        for path in (
            *("models/stats", "models/tiny/stats", "models/tiny/versions/1/stats", "models/tiny/trace/setting"),
            *("trace/setting", "logging", "systemsharedmemory/status", "cudasharedmemory/region/a/register"),
        )
    ),
    get("/v2/models/other/stats"),
    Http("DELETE", "/v2/logging"),
    get("/v2/systemsharedmemory"),
    get("/v2/systemsharedmemory/"),
    get("/v2/repository/index"),
    post("/v2/repository/nothing"),
    *(post("/v2/repository/index", body, note=body.decode("latin-1")) for body in (
        b"", b"{}", b'{"ready": true}', b'{"ready": false, "x": 1}', b'{"ready": "true"}', b'{"ready": "perhaps"}',
        b'{"ready": null}', b"[]", b"{", b"null", b"\xff",
    )),
    post("/v2/repository/index", b'{"a": [' + b"[]," * 2**15 + b"[]]}", note="large"),
    post("/v2/repository/models/tiny/load"),
    post("/v2/repository/models/other/unload", b"{"),
    get("/v2/repository/models/tiny/load"),
]  # fmt: skip
INFERENCE = [
    infer(tensor(TWO), note="FP32"),
    infer(tensor(TWO, flat=False), note="FP32 nested"),
    infer(tensor(ONE), note="without id", id=None),
    infer(tensor(ONE), note="id empty", id=""),
    infer(tensor(ONE), note="id in Unicode", id="Zaunkönig \u2028"),
    infer(tensor(ONE), note="id no text", id=7),
    infer(tensor(ONE), note="by version", path="/v2/models/tiny/versions/1/infer"),
    infer(tensor(ONE), note="another version", path="/v2/models/tiny/versions/2/infer"),
    infer(tensor(ONE), note="another model", path="/v2/models/other/infer"),
    infer(tensor(ONE, data=[1] * WINDOW), note="integers"),
    infer(recordings(WAV), note="recording"),
    infer(recordings(WAV, encoded(0.05, 44100, 2)), note="recordings"),
    infer(recordings(WAV), note="overlap", parameters={"overlap": 0.05, "probe": "linear"}),
    infer(recordings(WAV), note="overlap as text", parameters={"overlap": "0.05"}),
    infer(tensor(ONE), note="overlap of FP32", parameters={"overlap": 7}),
    *(
        infer(recordings(WAV), note=f"parameters {json.dumps(each)}", parameters=each)
        for each in (
            *({"overlap": "abc"}, {"overlap": -1}, {"overlap": None}, {"overlap": True}, {"overlap": 0.1}),
            *({"probe": "nothing"}, {"probe": None}, {"probe": 1}, {"mine": {"a": [1]}}, {"sequence_id": 3}),
        )
    ),
    infer(tensor(ONE), note="parameters no object", parameters=[]),
    infer(tensor(TWO), note="one output", outputs=[output("scores")]),
    infer(tensor(TWO), note="outputs in another order", outputs=[output("embedding"), output("logits")]),
    infer(tensor(ONE), note="output twice", outputs=[output("logits"), output("logits")]),
    infer(tensor(ONE), note="outputs empty", outputs=[]),
    infer(tensor(ONE), note="unknown output", outputs=[output("nothing")]),
    infer(tensor(ONE), note="output without name", outputs=[{}]),
    infer(tensor(TWO), note="classification", outputs=[output("scores", classification=2)]),
    infer(
        tensor(TWO),
        note="classification of all outputs",
        outputs=[output(each, classification=100) for each in ("logits", "embedding", "scores")],
    ),
    *(
        infer(tensor(ONE), note=f"classified {json.dumps(each)}", outputs=[output("logits", classification=each)])
        for each in (0, 1, -1, "2", "x", 1.5, None, True)
    ),
    infer(tensor(TWO), note="all in binary", parameters={"binary_data_output": True}),
    infer(tensor(TWO), note="one in binary", outputs=[output("scores", binary_data=True), output("logits")]),
    infer(
        tensor(TWO),
        note="all but one in binary",
        outputs=[output("scores", binary_data=False), output("logits")],
        parameters={"binary_data_output": True},
    ),
    infer(tensor(ONE), note="binary_data as text", outputs=[output("logits", binary_data="true")]),
    infer(tensor(TWO), note="classified in binary", outputs=[output("logits", classification=2, binary_data=True)]),
    infer(recordings(WAV), note="recording in binary", parameters={"binary_data_output": True}),
    infer(tensor(ONE), note="output in shared memory", outputs=[output("logits", shared_memory_region="a")]),
    binary(raw_tensor(TWO), note="FP32"),
    binary(raw_tensor(TWO), note="FP32, answer too", parameters={"binary_data_output": True}),
    binary(raw_recordings(WAV), note="recording"),
    binary(raw_recordings(WAV, FLOATS, WAV), note="recordings", outputs=[output("scores")]),
    binary(tensor(ONE), note="JSON alone"),
    binary(raw_tensor(ONE, data=[1]), note="beside data"),
    *(
        binary(raw_tensor(ONE), note=f"length {length or 'empty'}", length=length)
        for length in ("abc", "-1", "1e3", "99999999", "", "0", "+5", " 9", "9" * 40)
    ),
    binary(raw_tensor(ONE), note="and more", extra=b"more"),
    *(
        binary(raw_tensor(ONE, parameters={"binary_data_size": size}), note=f"size {json.dumps(size)}")
        for size in (4, -4, "6400", 6401, 6400.0, True)
    ),
    *(
        binary(({"name": "waveform", "shape": shape, "datatype": "BYTES"}, raw), note=note)
        for note, shape, raw in (
            ("no recording", [0], b""),
            ("fewer recordings", [2], element(WAV)),
            ("more recordings", [1], element(WAV) * 2),
            ("cut length", [1], b"\x01"),
            ("cut recording", [1], b"\xff\xff\xff\xffabc"),
            ("empty recording", [1], bytes(4)),
        )
    ),
    binary(({"name": "waveform", "shape": [1, WINDOW], "datatype": "FP32"}, bytes(7)), note="odd bytes"),
    binary(({"name": "waveform", "shape": [1, WINDOW], "datatype": "BOOL"}, b"\x02" * WINDOW), note="bad flags"),
    *(
        infer(tensor(ONE, **changes), note=note)
        for note, changes in (
            ("wrong name", {"name": "other"}),
            ("name null", {"name": 1}),
            ("wrong width", {"shape": [1, 3], "data": [0, 0, 0]}),
            ("wrong rank", {"shape": [WINDOW]}),
            ("no dimensions", {"shape": [], "data": 1.0}),
            ("shape without its data", {"shape": [2, WINDOW]}),
            ("negative shape", {"shape": [-1, -WINDOW]}),
            ("huge shape", {"shape": [2**62, 2**62]}),
            ("huge shape of no elements", {"shape": [0, 2**64], "data": []}),
            ("too many dimensions", {"shape": [1] * 100, "data": [0]}),
            ("shape text", {"shape": "abc"}),
            ("shape of fractions", {"shape": [1.5, WINDOW]}),
            ("no rows", {"shape": [0, WINDOW], "data": []}),
            ("NaN", {"data": [float("nan")] * WINDOW}),
            ("too large", {"data": [1e300] * WINDOW}),
            ("overflow", {"data": [3e38] * WINDOW}),
            ("text", {"data": ["0"] * WINDOW}),
            ("text in place of a list", {"data": "abc"}),
            ("an object", {"data": {"a": 1}}),
            ("true", {"data": [True] * WINDOW}),
            ("null inside", {"data": [None] * WINDOW}),
            ("no data", {"data": None}),
            ("ragged", {"data": [[0], [0, 0]]}),
            ("other type", {"datatype": "FP64"}),
            ("type in lower case", {"datatype": "fp32"}),
            ("no type", {"datatype": None}),
            ("flags", {"datatype": "BOOL", "data": [True] * WINDOW}),
            ("shared memory", {"parameters": {"shared_memory_region": "a"}}),
            ("binary size", {"parameters": {"binary_data_size": 4}}),
            ("unknown field of a tensor", {"mine": 1}),
        )
    ),
    *(
        infer(recordings(WAV, **changes), note=f"recording {note}")
        for note, changes in (
            ("no text", {"data": [1]}),
            ("no list", {"data": "AAAA"}),
            ("no base64", {"data": ["http://127.0.0.1:9/a.wav"]}),
            ("empty", {"data": [""]}),
            ("no audio", {"data": ["AAAA"]}),
            ("none", {"data": [], "shape": [0]}),
            ("nested", {"shape": [1, 1]}),
        )
    ),
    infer(note="no inputs"),
    infer(tensor(ONE), tensor(ONE), note="input twice"),
    infer(tensor(ONE), tensor(mask(1, WINDOW), "padding_mask", "BOOL"), note="mask that it takes not"),
    *(
        post(INFER, body, note=note)
        for note, body in (
            ("empty", b""),
            ("malformed", b"{"),
            ("a list", b"[]"),
            ("no object", b"{}"),
            ("null", b"null"),
            ("inputs no list", b'{"inputs": 1}'),
            ("not UTF-8", b'{"\xff": 1}'),
            ("deep", b'{"inputs": ' + b"[" * 5000),
            ("unknown field", as_json({"inputs": [tensor(ONE)], "mine": 1})),
            ("twice the same field", b'{"inputs": 1, ' + as_json({"inputs": [tensor(ONE)]})[1:]),
        )
    ),
    post(INFER, as_json({"inputs": [tensor(ONE)]}), headers=(("Content-Type", "text/plain"),), note="text/plain"),
    post(INFER, WAV, headers=(("Content-Type", "audio/wav"),), note="audio"),
    post(
        "/classify",
        as_json({"embeddings": EMBEDDINGS.tolist()}),
        note="of an audio bundle",
    ),
]  # fmt: skip

# gRPC

REQUEST_ID = (("x-request-id", "mine"),)
UNARY = {
    "ServerLive": {}, "ServerReady": {}, "ServerMetadata": {}, "ModelReady": {"name": "tiny"},
    "ModelMetadata": {"name": "tiny"}, "ModelConfig": {"name": "tiny"}, "RepositoryIndex": {},
    "RepositoryModelLoad": {"model_name": "tiny"}, "RepositoryModelUnload": {"model_name": "tiny"},
}  # fmt: skip
REFUSED = (
    "ModelStatistics", "TraceSetting", "LogSettings", "SystemSharedMemoryStatus", "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus", "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
)  # fmt: skip
NAMES = ("ModelReady", "ModelMetadata", "ModelConfig")
METHODS_OF_GRPC = [
    *(rpc(name, message=message(name, **fields)) for name, fields in UNARY.items()),
    *(rpc(name, "version", message(name, name="tiny", version="1")) for name in NAMES),
    *(rpc(name, "another model", message(name, name="other")) for name in NAMES),
    *(rpc(name, "another version", message(name, name="tiny", version="2")) for name in NAMES),
    *(rpc(name, "no model") for name in (*NAMES, "ModelInfer", "RepositoryModelLoad")),
    *(Grpc(name, b"\xff\xff\xff", "no message") for name in (*UNARY, "ModelInfer", f"{HEALTH}/Check")),
    *(Grpc(name, b"\x0a\x02\xff\xfe", "text that is none") for name in ("ModelReady", "ModelInfer")),
    *(Grpc(name, None, "without a message") for name in ("ServerLive", "ModelInfer", f"{HEALTH}/Check", "Nothing")),
    *(rpc(name) for name in REFUSED),
    Grpc("ModelStatistics", b"\xff", "no message"),
    Grpc("ModelStreamInfer", None, "without a message", kind="parts"),
    Grpc("ModelStreamInfer", note="no model", kind="parts"),
    Grpc("ModelStreamInfer", b"\xff\xff\xff", "no message", kind="parts"),
    *(
        Grpc("ModelStreamInfer", dumped(infer_message(*inputs, id="7", **fields)), note, kind="parts")
        for note, inputs, fields in (
            ("FP32", [message_tensor(TWO)], {}),
            ("recordings", [message_recordings(WAV, encoded(0.1))], {"outputs": ["scores"]}),
            ("hop", [message_recordings(WAV)], {"outputs": ["scores"], "parameters": {"hop": 0.05}}),
            ("detections", [message_recordings(WAV)], {"outputs": ["detections"], "parameters": {"top_k": 1}}),
            ("merged", [message_recordings(WAV)], {"outputs": ["detections"], "parameters": {"merge": 0.0}}),
            ("no audio", [message_recordings(b"nothing")], {}),
            ("another model", [message_recordings(WAV)], {"model": "other"}),
        )
    ),
    model_infer(
        message_recordings(WAV, WAV),
        note="detections",
        outputs=["detections"],
        parameters={"top_k": 1, "label": '["robin", "chiffchaff"]', "merge": 0},
    ),
    model_infer(message_recordings(WAV), note="unknown label", outputs=["detections"], parameters={"label": "wren"}),
    model_infer(message_tensor(ONE), note="detections of windows", outputs=["detections"]),
    *(rpc(name) for name in ("Nothing", "modelinfer", "inference.Nothing/ModelInfer", "/ModelInfer", "x/y/z")),
    rpc("RepositoryIndex", "ready", message("RepositoryIndex", ready=True)),
    rpc("RepositoryIndex", "of a repository", message("RepositoryIndex", repository_name="x")),
    *(
        Grpc(f"{HEALTH}/{method}", data, note, kind=kind)
        for method, kind in (("Check", "call"), ("Watch", "watch"))
        for note, data in (
            ("", b""),
            ("of the protocol", b"\x0a\x1e" + b"inference.GRPCInferenceService"),
            ("of another service", b"\x0a\x07nothing"),
        )
    ),
    Grpc(f"{HEALTH}/Watch", b"\xff\xff", "no message", kind="watch"),
    rpc(f"{HEALTH}/List"),
    *(
        rpc("ServerLive", note, metadata=(("x-request-id", identity),))
        for note, identity in (("id", "my-id:1"), ("id with a blank", "my id"), ("id of 129", "i" * 129))
    ),
    rpc("Nothing", "id", metadata=REQUEST_ID),
    rpc("ModelReady", "id of an error", message("ModelReady", name="other"), metadata=REQUEST_ID),
    rpc("ServerLive", "large", timeout=20, message=message("ModelInfer", id="i" * 2**16)),
    rpc("RepositoryIndex", "large", timeout=20, message=message("ModelInfer", id="i" * 2**16)),
]  # fmt: skip
GRPC_INFERENCE = [
    model_infer(message_tensor(TWO), note="FP32"),
    model_infer(message_tensor(TWO, typed=True), note="FP32 typed"),
    model_infer(message_tensor(ONE), note="id and version", id="Zaunkönig", model_version="1"),
    model_infer(message_tensor(ONE), note="x-request-id", metadata=REQUEST_ID),
    model_infer(message_recordings(WAV), note="recording"),
    model_infer(message_recordings(WAV, typed=True), note="recording typed"),
    model_infer(message_recordings(WAV, encoded(0.05, 44100, 2)), note="recordings", outputs=["scores"]),
    *(
        model_infer(message_recordings(WAV), note=f"parameters {json.dumps(each)}", parameters=each)
        for each in (
            *({"overlap": 0.05}, {"overlap": "0.05"}, {"overlap": 0}, {"probe": "linear"}, {"mine": True}),
            *({"overlap": "abc"}, {"overlap": -1.0}, {"overlap": 0.1}, {"overlap": float("nan")}, {"overlap": True}),
            *({"probe": "nothing"}, {"probe": ""}, {"probe": 1}),
        )
    ),
    model_infer(message_tensor(TWO), note="outputs in another order", outputs=["embedding", "logits"]),
    model_infer(message_tensor(ONE), note="output twice", outputs=["logits", "logits"]),
    model_infer(message_tensor(ONE), note="unknown output", outputs=["nothing"]),
    model_infer(message_tensor(TWO), note="classification", outputs=[("scores", {"classification": 2}), "logits"]),
    *(
        model_infer(
            message_tensor(ONE),
            note=f"classification {json.dumps(each)}",
            outputs=[("embedding", {"classification": each})],
        )
        for each in (100, 0, -1, "2", "x", 1.5, True)
    ),
    model_infer(message_tensor(ONE), note="shared memory", outputs=[("logits", {"shared_memory_region": "a"})]),
    model_infer(
        message_tensor(ONE, parameters={"shared_memory_region": parameter("a")}), note="input in shared memory"
    ),
    model_infer(message_tensor(ONE), note="another model", model="other"),
    model_infer(message_tensor(ONE), note="another version", model_version="2"),
    model_infer(note="no inputs"),
    model_infer(message_tensor(ONE), message_tensor(ONE), note="input twice"),
    model_infer(message_tensor(ONE, typed=True), note="typed and raw", raw=[bytes(4 * WINDOW)]),
    model_infer(message_tensor(ONE), note="no data", raw=[]),
    model_infer(message_tensor(ONE), note="too much data", raw=[bytes(4 * WINDOW)] * 2),
    *(
        model_infer(message_tensor(ONE, **changes), note=note, **rest)
        for note, changes, rest in (
            ("wrong name", {"name": "other"}, {}),
            ("other type", {"datatype": "FP64"}, {}),
            ("no type", {"datatype": ""}, {}),
            ("flags", {"datatype": "BOOL"}, {}),
            ("wrong width", {"shape": [1, 3]}, {"raw": [bytes(12)]}),
            ("wrong rank", {"shape": [WINDOW]}, {}),
            ("shape without its data", {"shape": [2, WINDOW]}, {}),
            ("negative shape", {"shape": [-1, -WINDOW]}, {}),
            ("huge shape", {"shape": [2**62, 2**62]}, {}),
            ("huge shape of no elements", {"shape": [0, 2**62]}, {"raw": [b""]}),
            ("too many dimensions", {"shape": [1] * 100}, {"raw": [bytes(4)]}),
            ("no rows", {"shape": [0, WINDOW]}, {"raw": [b""]}),
            ("odd bytes", {}, {"raw": [bytes(7)]}),
            ("NaN", {}, {"raw": [np.full(WINDOW, np.nan, "<f4").tobytes()]}),
            ("overflow", {}, {"raw": [np.full(WINDOW, 3e38, "<f4").tobytes()]}),
        )
    ),
    *(
        model_infer(message_recordings(WAV, shape=shape), note=f"recording {note}", raw=[raw])
        for note, shape, raw in (
            ("none", [0], b""),
            ("fewer", [2], element(WAV)),
            ("more", [1], element(WAV) * 2),
            ("cut length", [1], b"\x01"),
            ("cut", [1], b"\xff\xff\xff\xffabc"),
            ("empty", [1], bytes(4)),
            ("nested", [1, 1], element(WAV)),
            ("no audio", [1], element(b"no audio")),
            ("no samples", [1], element(BROKEN["no samples"])),
        )
    ),
    model_infer(message_recordings(b"no audio", typed=True), note="recording typed, no audio"),
    model_infer(message_recordings(b"", typed=True), note="recording typed, empty"),
    model_infer(message_recordings(encoded(0.5, 44100, 2, "OGG")), note="OGG", lossy=True),
    model_infer(message_recordings(encoded(0.5, container="MP3")), note="MP3", lossy=True),
    *(
        Grpc("ModelInfer", b"\x0a\x04tiny" + part * 20_000, f"many {note}")
        for note, part in (("inputs", b"*\0"), ("outputs", b"2\0"), ("contents", b":\0"), ("parameters", b'"\0'))
    ),
    Grpc("ModelInfer", dumped(infer_message(message_tensor(ONE))) + b"\x98\x06\x01", "unknown field"),
    Grpc("ModelInfer", b"\x2b\x2c", "groups"),
]  # fmt: skip

# How far such a call gets is a matter of luck: its code alone is kept, and the metrics don't count it.
EXPIRED = rpc("ModelInfer", "expired", infer_message(message_recordings(WAV)), timeout=0.000001, keep="code")

# How far such a call gets is a matter of luck: its code alone is kept, and the metrics don't count it.
EXPIRED = rpc("ModelInfer", "expired", infer_message(message_recordings(WAV)), timeout=0.000001, keep="code")

AUDIO = [
    *PAGES, *HEADS, *METHODS, *PREDICT, *SENT, *FORMS, *CONTAINERS, *BAD_AUDIO, *MODELS, *INFERENCE,
    *METHODS_OF_GRPC, *GRPC_INFERENCE, *LAST_PAGES, EXPIRED,
]  # fmt: skip

# A folder of bundles of every kind

TOP = {"top_k": "2"}
NAMED = (
    "tiny", "random", "plain", "probes", "backbone", "masked", "clips", "sequence", "offline", "linked", "stranger",
    "broken",
)  # fmt: skip
# Not so far: the message has no word for BOOL, so that the call fails with a traceback in the log.
UNASKED = {("ModelConfig", "masked"), ("ModelConfig", "clips")}
SEQUENCES = embeddings(2, 3, DIM)
CLIP, MASK = tensor(windows(1, 600)), tensor(mask(1, 600), "padding_mask", "BOOL")
CLIP_MESSAGE, MASK_MESSAGE = message_tensor(windows(1, 600)), message_tensor(mask(1, 600), "padding_mask", "BOOL")


def at(name):
    return f"/v2/models/{name}/infer"


def classify(array, note="", **options):
    note = note or f"{list(array.shape)} {json.dumps(options)}"
    return post("/classify", as_json({"embeddings": array.tolist(), **options}), note=note)


def clip(rows, samples, masked=True):
    """Clips with their mask over both transports."""
    wave, padding = windows(rows, samples), mask(rows, samples)
    note = f"{rows} of {samples} samples{' masked' * masked}"
    for name in ("clips", "masked"):
        padded = {
            True: (
                tensor(padding, "padding_mask", "BOOL"),
                raw_tensor(padding, "padding_mask"),
                message_tensor(padding, "padding_mask", "BOOL"),
            ),
            False: (),
        }[masked]
        yield infer(tensor(wave), *padded[:1], note=note, path=at(name))
        yield binary(raw_tensor(wave), *padded[1:2], note=note, path=at(name), outputs=[output("embedding")])
        yield model_infer(
            message_tensor(wave), *padded[2:], note=f"{name} {note}", model=name, outputs=["embedding"]
        )


SHELF = [
    get("/"),
    get("/", headers=(("Accept", "text/html"),), note="browser"),
    get("/readyz"),
    get("/v2/health/ready"),
    post("/v2/repository/index"),
    post("/v2/repository/index", b'{"ready": true}', note="ready"),
    rpc("RepositoryIndex"),
    rpc("RepositoryIndex", "ready", message("RepositoryIndex", ready=True)),
    *(get(f"/v2/models/{name}{what}") for name in NAMED for what in ("", "/ready", "/config")),
    *(rpc(name, each, message(name, name=each)) for each in NAMED for name in NAMES if (name, each) not in UNASKED),
    *(get(f"/v2/models/tiny/versions/{each}") for each in ("9", "10", "11", "1")),
    get("/v2/models/linked/versions/1/ready"),
    rpc("ModelMetadata", "tiny 9", message("ModelMetadata", name="tiny", version="9")),
    # Without a name
    *(post(path, WAV) for path in ("/predict", "/predict_all", "/embed")),
    classify(EMBEDDINGS),
    post("/predict?version=9", WAV),
    # By name
    *posts("/predict", WAV, *({"model": name, **TOP} for name in NAMED)),
    *posts("/predict", WAV, *({"model": name} for name in ("random", "plain"))),
    *posts("/predict", WAV, {"model": "plain", "threshold": "0.1"}, {"model": "random", "threshold": "0.3"}),
    *posts("/predict_all", WAV, *({"model": name, **TOP} for name in NAMED)),
    *posts("/embed", WAV, *({"model": name} for name in NAMED)),
    *posts("/predict", WAV, *({"model": "tiny", "version": each, **TOP} for each in ("9", "10", "11"))),
    *posts("/predict", WAV, *({"model": "linked", "version": each, **TOP} for each in ("1", "2", "3"))),
    *posts("/predict", WAV, *({"model": "probes", "probe": each, **TOP} for each in ("birds", "noise", "linear"))),
    *posts("/predict", WAV, {"model": "probes", "probe": "noise"}, {"model": "linked", "probe": "x"}),
    *posts("/predict", WAV, {"model": "linked", "overlap": "0.05", **TOP}, {"model": "linked", "overlap": "0.1"}),
    *posts("/predict", WAV, {"model": "broken", "version": "1"}, {"model": "broken", "version": "2"}),
    *posts("/predict_all", WAV, {"model": "backbone", "overlap": "0.05"}, {"model": "probes", "threshold": "-1"}),
    *posts("/predict_all", WAV, {"model": "tiny", "version": "9"}, {"model": "backbone", "probe": "linear"}),
    *posts("/embed", WAV, {"model": "probes", "output": "embedding"}, {"model": "probes", "output": "birds"}),
    *posts("/embed", encoded(0.03), {"model": "clips"}, {"model": "masked"}, note="0.03 s"),
    *posts("/embed", encoded(0.11), {"model": "clips"}, {"model": "clips", "overlap": "0.05"}, note="0.11 s"),
    post("/predict?model=linked", b"no audio", note="no audio"),
    post("/predict?model=stranger", b"no audio", note="no audio"),
    form("/predict", [file(WAV), field("model", "linked"), field("top_k", "1")], "linked"),
    form("/predict_all", [file(WAV), field("model", '"backbone"'), field("top_k", "1")], "backbone"),
    # Embeddings
    *(classify(EMBEDDINGS, model=name) for name in (*NAMED, "other")),
    classify(SEQUENCES, model="sequence"),
    classify(embeddings(1, 1, DIM), model="sequence", top_k=1),
    classify(SEQUENCES, model="offline"),
    classify(EMBEDDINGS, model="linked", version="1", top_k=1),
    classify(EMBEDDINGS, model="linked", version="9"),
    # The Open Inference Protocol
    *(
        infer(tensor(ONE), note=name, path=at(name), outputs=[])
        for name in ("tiny", "random", "plain", "probes", "backbone", "masked", "clips", "broken")
    ),
    infer(tensor(ONE), note="version 9", path="/v2/models/tiny/versions/9/infer"),
    infer(tensor(EMBEDDINGS, "embedding"), note="embeddings", path=at("linked")),
    infer(tensor(EMBEDDINGS), note="wrong name", path=at("linked")),
    infer(tensor(SEQUENCES, "embedding"), note="sequences", path=at("sequence")),
    infer(tensor(EMBEDDINGS, "embedding"), note="no sequences", path=at("sequence")),
    infer(recordings(WAV, name="embedding"), note="recording", path=at("sequence")),
    infer(recordings(WAV, name="embedding"), note="recording", path=at("linked"), parameters={"overlap": 0.05}),
    infer(recordings(WAV, name="embedding"), note="probe", path=at("linked"), parameters={"probe": "nothing"}),
    infer(recordings(WAV, name="embedding"), note="recording", path=at("offline")),
    infer(recordings(WAV, name="embedding"), note="recording", path=at("stranger")),
    infer(recordings(WAV, encoded(0.03)), note="recordings", path=at("clips")),
    infer(recordings(WAV, encoded(0.03)), note="recordings", path=at("masked")),
    infer(recordings(WAV), note="recording", path=at("backbone")),
    infer(
        recordings(WAV),
        note="of two heads",
        path=at("probes"),
        parameters={"probe": "noise"},
        outputs=[output("noise.scores", classification=1), output("birds.logits", classification=2)],
    ),
    binary(raw_tensor(EMBEDDINGS, "embedding"), note="embeddings", path=at("linked")),
    binary(raw_recordings(WAV, name="embedding"), note="recording", path=at("linked")),
    *(
        model_infer(message_tensor(ONE), note=name, model=name)
        for name in ("tiny", "random", "plain", "probes", "backbone", "masked", "broken")
    ),
    model_infer(message_tensor(ONE), note="version 9", model_version="9"),
    model_infer(message_tensor(EMBEDDINGS, "embedding"), note="linked", model="linked"),
    model_infer(message_tensor(SEQUENCES, "embedding"), note="sequence", model="sequence"),
    *(
        model_infer(message_recordings(WAV, name="embedding"), note=f"recording {name}", model=name)
        for name in ("linked", "offline", "stranger", "sequence")
    ),
    model_infer(message_recordings(WAV, encoded(0.03)), note="recordings clips", model="clips"),
    model_infer(
        message_recordings(WAV),
        note="of two heads",
        model="probes",
        outputs=["noise.scores", ("birds.scores", {"classification": 1})],
    ),
    # Padding masks and clips of several lengths
    *clip(2, 1600),
    *clip(2, 600),
    *clip(2, 3000),
    *clip(1, 599, masked=False),
    *clip(1, 3000, masked=False),
    *(
        infer(*inputs, note=note, path=at("clips"))
        for note, inputs in (
            ("mask alone", [MASK]),
            ("mask first", [MASK, CLIP]),
            ("mask of another name", [CLIP, {**MASK, "name": "mask"}]),
            ("mask too short", [CLIP, tensor(mask(1, 599), "padding_mask", "BOOL")]),
            ("mask of numbers", [CLIP, {**CLIP, "name": "padding_mask"}]),
            ("mask of numbers as BOOL", [CLIP, {**CLIP, "name": "padding_mask", "datatype": "BOOL"}]),
            ("mask of all", [CLIP, tensor(mask(1, 600) | True, "padding_mask", "BOOL")]),
            ("mask ragged", [CLIP, {**MASK, "data": [[True], []]}]),
            ("mask beside recordings", [recordings(WAV), MASK]),
        )
    ),
    *(
        model_infer(*inputs, note=note, model="clips", outputs=["embedding"])
        for note, inputs in (
            (
                "mask typed",
                [
                    message_tensor(windows(2, 600), typed=True),
                    message_tensor(mask(2, 600), "padding_mask", "BOOL", typed=True),
                ],
            ),
            ("mask alone", [MASK_MESSAGE]),
            ("mask of all", [CLIP_MESSAGE, (MASK_MESSAGE[0], b"\1" * 600)]),
            ("mask of bad flags", [CLIP_MESSAGE, (MASK_MESSAGE[0], b"\2" * 600)]),
        )
    ),
    *LAST_PAGES,
]  # fmt: skip

# One bundle that takes embeddings

ONE_EMBEDDING = embeddings(1, DIM)
EMBEDDING = [
    get("/"),
    get("/", headers=(("Accept", "text/html"),), note="browser"),
    get("/v2/models/tiny-offline"),
    *(
        classify(EMBEDDINGS, **options)
        for options in (
            {},
            *({"top_k": each} for each in (1, 100, 0, -1, 1.5, "1", True, None)),
            *({"threshold": each} for each in (0.2, 0, -1, "0.5", None, True)),
            *({"probe": each} for each in ("linear", "nothing", "", None, 1)),
            *({"model": each} for each in ("tiny-offline", "other", "", None)),
            *({"version": each} for each in ("1", "2", "", 1)),
            {"threshold": 0.2, "top_k": 2, "probe": "linear", "model": "tiny-offline", "version": "1"},
            {"overlap": 1},
        )
    ),
    *(
        post("/classify", body, note=note)
        for note, body in (
            ("malformed", b'{"embeddings": [[1, 2'),
            ("empty", b""),
            ("not UTF-8", b'{"\xff": 1}'),
            ("deep", b"[" * 5000),
            ("a list", b"[]"),
            ("missing", b"{}"),
            ("text", b'{"embeddings": "abc"}'),
            ("text inside", b'{"embeddings": [["1","2","3","4"]]}'),
            ("null inside", b'{"embeddings": [[null,0,0,0]]}'),
            ("true inside", b'{"embeddings": [[true,true,true,true]]}'),
            ("true beside numbers", b'{"embeddings": [[true,0.5,0,0]]}'),
            ("integers", b'{"embeddings": [[1,2,3,4]]}'),
            ("NaN", b'{"embeddings": [[NaN,0,0,0]]}'),
            ("threshold NaN", b'{"embeddings": [[0,0,0,0]], "threshold": NaN}'),
            ("infinity", b'{"embeddings": [[1e999,0,0,0]]}'),
            ("too large for float32", b'{"embeddings": [[1e300,0,0,0]]}'),
            ("overflow", b'{"embeddings": [[3e38,3e38,3e38,-3e38]]}'),
            ("large integer", b'{"embeddings": [[' + b"9" * 30 + b",0,0,0]]}"),
            ("huge integer", b'{"embeddings": [[' + b"9" * 1000 + b",0,0,0]]}"),
            ("ragged", b'{"embeddings": [[0,0,0,0],[0]]}'),
            ("wrong width", b'{"embeddings": [[0,0,0]]}'),
            ("wrong rank", b'{"embeddings": [0,0,0,0]}'),
            ("no rows", b'{"embeddings": []}'),
            ("empty row", b'{"embeddings": [[]]}'),
            ("lists in lists", b'{"embeddings": ' + b"[" * 100 + b"0" + b"]" * 100 + b"}"),
            ("twice the same field", b'{"embeddings": 1, "embeddings": [[0,0,0,0]]}'),
        )
    ),
    post("/classify?top_k=1", as_json({"embeddings": ONE_EMBEDDING.tolist()}), note="option in the query"),
    post(
        "/classify",
        as_json({"embeddings": ONE_EMBEDDING.tolist()}),
        headers=(("Content-Type", "application/json"),),
        note="with type",
    ),
    form("/classify", [field("embeddings", "[[0, 0, 0, 0]]")], "embeddings"),
    *(post(path, WAV) for path in ("/predict", "/predict_all", "/embed", "/predict?top_k=0", "/predict?overlap=9")),
    post("/predict_all?model=tiny-offline", WAV),
    infer(tensor(EMBEDDINGS, "embedding"), note="embeddings", path=at("tiny-offline")),
    infer(tensor(EMBEDDINGS, "embedding", shape=[4, 2]), note="wrong width", path=at("tiny-offline")),
    infer(recordings(WAV, name="embedding"), note="recording", path=at("tiny-offline")),
    model_infer(message_tensor(EMBEDDINGS, "embedding"), note="embeddings", model="tiny-offline"),
    model_infer(message_recordings(WAV, name="embedding"), note="recording", model="tiny-offline"),
    *LAST_PAGES,
]

# Keys


def bearer(text):
    return (("Authorization", text),)


def keys():
    first, second = KEYS
    answered = {"first": f"Bearer {first}", "second": f"Bearer {second}", "lower case": f"bearer  {first}"}
    refused = {
        "none": None, "empty": "", "scheme alone": "Bearer", "no scheme": first, "another scheme": f"Basic {first}",
        "cut": f"Bearer {first[:-1]}", "longer": f"Bearer {first}x", "another case": f"Bearer {first.upper()}",
        "two": f"Bearer {first} {second}", "another": "Bearer nothing",
    }  # fmt: skip
    for note, text in {**answered, **refused, "not ASCII": "Bearer schl\xfcssel"}.items():
        headers = bearer(text) if text is not None else ()
        yield post("/predict?top_k=1", WAV, headers=headers, note=note)
    for note, text in {**answered, **refused}.items():
        metadata = (("authorization", text),) if text is not None else ()
        yield rpc("ModelReady", note, message("ModelReady", name="tiny"), metadata=metadata)
    for path in ("/livez", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        yield get(path)
    for method, path in (
        *(("GET", path) for path in ("/", "/metrics", "/docs.json", "/schema.json", "/static_content/main.js")),
        *(("GET", path) for path in ("/nothing", "/livez/", "//livez", "/livez%0a", "/LIVEZ", "/v2", "/v2/health")),
        *(("GET", path) for path in ("/v2/models/tiny", "/v2/models/tiny/ready", "/v2/logging", "/predict")),
        *(("POST", path) for path in ("/embed", "/predict_all", "/classify", INFER, "/v2/repository/index")),
        *(("OPTIONS", "/predict"), ("HEAD", "/"), ("DELETE", "/livez"), ("POST", "/v2/repository/models/tiny/load")),
    ):
        yield Http(method, path, b"" if method == "POST" else None, note="no key")
    yield post("/predict", headers=(("X-Request-Id", "mine"),), note="no key, id")
    yield post("/predict", headers=(("Request-Timeout", "abc"),), note="no key, timeout abc")
    yield get("/", headers=bearer(f"Bearer {first}"), note="key")
    for name in (*UNARY, "ModelInfer", "ModelStatistics", "ModelStreamInfer", "Nothing"):
        yield rpc(name, "no key")
    yield Grpc(f"{HEALTH}/Check")
    yield Grpc(f"{HEALTH}/Watch", kind="watch")
    yield rpc(f"{HEALTH}/List", "no key")
    yield rpc("ModelReady", "no key, id", metadata=REQUEST_ID)
    yield model_infer(message_tensor(ONE), note="key", metadata=(("authorization", f"Bearer {second}"),))
    yield get("/metrics", headers=bearer(f"Bearer {second}"), note="key", keep="metrics")


# Limits


def too_long(method, path, size=MAX_BODY + 1, **rest):
    """A request that says how large its body is, which never comes."""
    return Http(method, path, headers=(("Content-Length", str(size)),), note=f"{size} bytes", **rest)


CHUNKED = (("Transfer-Encoding", "chunked"),)
MUCH = b"f000\r\n" + bytes(0xF000) + b"\r\n0\r\n\r\n"  # more than a body may have
SLEEPY = silence(3)
LIMITS = [
    get("/"),
    post("/predict?model=tiny&top_k=1", WAV),
    post("/predict?model=slow&top_k=1", WAV),  # so that its series are there, whatever becomes of the others
    post("/predict?model=tiny&top_k=1", WAV + bytes(MAX_BODY - len(WAV)), note="of the limit"),
    *(too_long("POST", path) for path in ("/predict", "/embed", "/classify", INFER, "/nothing", "/predict/")),
    *(too_long(*each) for each in (("PUT", "/predict"), ("GET", "/livez"), ("GET", "/metrics"), ("GET", "/v2"))),
    too_long("POST", "/v2/repository/index"),
    too_long("POST", "/predict", 10**30),
    post("/predict?model=tiny", MUCH, headers=CHUNKED, note="chunked"),
    post(INFER, MUCH, headers=CHUNKED, note="chunked"),
    post("/v2/repository/index", MUCH, headers=CHUNKED, note="chunked"),
    Http("POST", "/predict", b"RIFF", (("Content-Length", "1000"),), "slow"),
    Http("POST", "/v2/repository/index", b"{", (("Content-Length", "1000"),), "slow"),
    # Recordings
    *(
        post(f"{path}?model=tiny", data, note=note)
        for path in ("/predict", "/embed")
        for note, data in (
            ("longer than is taken", silence(61)),
            ("large once decoded", silence(30, 48000)),
            ("large once decoded, stereo", silence(55, 16000, 2)),
            ("too many channels", encoded(0.1, 16000, 3)),
        )
    ),
    post("/predict?model=tiny", patched(silence(1), 21, b"\xff" * 5), note="says it is long"),
    post("/predict?model=tiny&overlap=0.0999", WAV, note="many windows"),
    post("/predict?model=tiny&threshold=-1", SLEEPY, note="large answer"),
    post("/predict?model=tiny&threshold=1", SLEEPY, note="small answer"),
    post("/predict_all?model=tiny&threshold=-1", SLEEPY, note="large answer"),
    post("/embed?model=tiny", silence(12), note="large answer"),
    infer(recordings(silence(12)), note="large answer"),
    infer(recordings(silence(40)), note="larger answer", parameters={"binary_data_output": True}),
    infer(recordings(silence(10)), note="classified", outputs=[output("logits", classification=3)]),
    model_infer(message_recordings(silence(40)), note="large answer"),
    model_infer(message_recordings(silence(61)), note="longer than is taken"),
    model_infer(message_recordings(encoded(0.1, 16000, 3)), note="too many channels"),
    # Tensors
    infer(tensor(TWO), note="much JSON"),
    binary(raw_tensor(TWO), note="much beside JSON", parameters={"binary_data_output": True}),
    post("/classify", as_json({"embeddings": [[0.0] * DIM] * 2000}), note="much JSON"),
    classify(embeddings(1, 5, DIM), model="sequence", note="5 steps"),
    classify(embeddings(1, 6, DIM), model="sequence", note="6 steps"),
    infer(tensor(embeddings(1, 6, DIM), "embedding"), note="6 steps", path=at("sequence")),
    model_infer(message_tensor(embeddings(1, 6, DIM), "embedding"), note="6 steps", model="sequence"),
    binary(raw_tensor(windows(1, 3200)), note="clip", path=at("clips"), outputs=[output("embedding")]),
    binary(raw_tensor(windows(1, 3201)), note="long clip", path=at("clips"), outputs=[output("embedding")]),
    model_infer(message_tensor(windows(1, 3201)), note="long clip", model="clips"),
    # Messages
    Grpc("ModelInfer", bytes(MAX_BODY + 1), "too large"),
    Grpc(f"{HEALTH}/Check", bytes(MAX_BODY + 1), "too large"),
    Grpc("ServerLive", bytes(MAX_BODY + 1), "too large"),
    Grpc("ModelInfer", note="slow", kind="silent"),
    # Somebody else takes the place
    post("/predict?model=tiny", WAV, situation="busy"),
    post("/predict_all?model=tiny", situation="busy"),
    post("/classify", situation="busy"),
    post("/predict?top_k=abc", WAV, situation="busy"),
    post("/nothing", situation="busy"),
    post(INFER, b"{}", situation="busy"),
    post("/v2/repository/index", situation="busy"),
    post("/v2/repository/models/tiny/load", situation="busy"),
    *(get(path, situation="busy") for path in ("/readyz", "/v2/health/ready", "/v2", "/predict")),
    get("/v2/models/tiny", situation="busy"),
    model_infer(message_recordings(WAV), note="recording", situation="busy"),
    rpc("ModelMetadata", message=message("ModelMetadata", name="tiny"), situation="busy"),
    Grpc(f"{HEALTH}/Check", situation="busy"),
    too_long("POST", "/predict", MAX_BODY, situation="held"),
    too_long("GET", "/v2", MAX_BODY, situation="held"),
    post("/predict?model=tiny&top_k=1", WAV, situation="held"),
    get("/readyz", situation="held"),
    Grpc("ModelInfer", bytes(MAX_BODY - 100), "large", situation="held"),
    rpc("ModelReady", message=message("ModelReady", name="tiny"), situation="held"),
    post("/predict?model=tiny&top_k=1", WAV, note="at the end"),
    get("/metrics", keep="metrics"),
]

# Clients may load and unload


def control(what, name, body=b"", note=""):
    return post(f"/v2/repository/models/{name}/{what}", body, note=note)


def rpc_control(what, name, note="", **parameters):
    request = message(f"RepositoryModel{what}", model_name=name)
    for key, value in parameters.items():
        request.parameters[key].string_param = value
    return rpc(f"RepositoryModel{what}", f"{name} {note}".strip(), request)


def state(note, *names):
    """How models stand, over both transports."""
    yield post("/v2/repository/index", note=note)
    yield rpc("RepositoryIndex", note)
    for name in names:
        yield get(f"/v2/models/{name}/ready", note=note)
        yield rpc("ModelReady", f"{name} {note}", message("ModelReady", name=name))
        yield post(f"/predict?model={name}&top_k=1", WAV, note=note)
        yield model_infer(message_tensor(ONE), note=f"{name} {note}", model=name, outputs=["scores"])


EXPLICIT = [
    *state("at first", "tiny", "random", "broken", "other"),
    *(
        control(what, name, body, note)
        for what in ("load", "unload")
        for name, body, note in (
            ("other", b"", ""),
            ("tiny", b"[]", "a list"),
            ("tiny", b"{", "malformed"),
            ("tiny", b"\xff", "not UTF-8"),
            ("tiny", b'{"parameters": 1}', "parameters no object"),
            ("ti%6Ey%2F", b"", "odd name"),
        )
    ),
    control("load", "tiny", b'{"parameters": {"config": "{}", "file:1/a": "AA"}}', "config"),
    control("load", "tiny", b'{"parameters": {"mine": 1}, "x": 2}', "parameters that mean nothing"),
    control("load", "broken"),
    control("load", "tiny", b" " * 2**17, "large"),
    Http("GET", "/v2/repository/models/tiny/load"),
    Http("PUT", "/v2/repository/models/tiny/unload"),
    rpc_control("Load", "other"),
    rpc_control("Unload", "other"),
    rpc_control("Load", "broken"),
    rpc_control("Load", "tiny", "config", config="{}"),
    rpc_control("Load", "tiny", "parameters that mean nothing", mine="x"),
    rpc_control("Load", ""),
    *state("after refusals", "tiny"),
    control("unload", "random", b'{"parameters": {"unload_dependents": true}}'),
    *state("without random", "random", "tiny"),
    get("/"),
    post("/predict?top_k=1", WAV, note="without a name"),
    control("unload", "random", note="again"),
    rpc_control("Load", "random"),
    *state("with random", "random"),
    rpc_control("Unload", "random"),
    control("unload", "tiny"),
    *state("without any", "tiny", "random", "broken", "other"),
    get("/", note="without any"),
    get("/", headers=(("Accept", "text/html"),), note="browser, without any"),
    get("/readyz"),
    get("/livez"),
    get("/v2/health/ready"),
    rpc("ServerReady"),
    Grpc(f"{HEALTH}/Check"),
    Grpc(f"{HEALTH}/Watch", kind="watch"),
    *(post(path, WAV, note="without any") for path in ("/predict", "/predict_all", "/embed")),
    classify(ONE_EMBEDDING),
    control("load", "tiny"),
    control("load", "random"),
    *state("at the end", "tiny", "random"),
    get("/readyz", note="at the end"),
    *LAST_PAGES,
]

TABLE = {
    "audio": AUDIO,
    "shelf": SHELF,
    "embedding": EMBEDDING,
    "keys": list(keys()),
    "limits": LIMITS,
    "explicit": EXPLICIT,
}
