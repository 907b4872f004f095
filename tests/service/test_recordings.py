"""Recordings that end early, channels, and what remains at the end: the same over HTTP, gRPC and in the shell."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from avex_serve.audio.reader import open_audio
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from tests.answers import as_json
from tests.audio.test_containers import encode

RATE = 16000
WAVE = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE // 2, 2))
STEREO = encode("WAV", "PCM_16", WAVE, RATE)
AVEX_SERVE = Path(sys.executable).with_name("avex-serve")


def by_http(server, data, options):
    response = server.post("/predict", content=data, params=options)
    assert response.status_code == 200, response.text
    return response.json()


def by_form(server, data, options):
    response = server.post("/predict", files={"audio": ("a.wav", data)}, data=options)
    assert response.status_code == 200, response.text
    return response.json()


def by_command(bundle, data, options, path):
    path.write_bytes(data)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [AVEX_SERVE, "predict", bundle, path, "--json", *given]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    document = json.loads(result.stdout)
    assert [line for line in result.stderr.splitlines() if document["warnings"][0] in line] or not result.stderr
    assert document.pop("file") == str(path)
    return document


@pytest.mark.parametrize(
    ("data", "options", "duration", "warning"),
    [
        (STEREO, {"channel": 2}, 0.5, None),
        (STEREO, {"channel": "mix", "final_clip": "full", "overlap": 0.03}, 0.5, None),
        (STEREO[: 44 + 4 * 5000], {}, 5000 / RATE, "ends early"),
        (encode("FLAC", wave=WAVE, rate=RATE)[:-900], {}, None, "ends early"),
        (encode("WAV", wave=np.stack([WAVE[:, 0], -WAVE[:, 0]], axis=1), rate=RATE), {}, 0.5, "cancel each other"),
    ],
    ids=["channel", "final clip", "cut WAV", "cut FLAC", "cancelled"],
)
def test_one_answer_everywhere(audio_server, audio_bundle, audio_engine, tmp_path, data, options, duration, warning):
    options = {"threshold": 0.0, **options}
    expected = as_json(pipeline.predict(audio_engine, partial(open_audio, data), Query(**options)))
    assert duration is None or expected["duration"] == duration
    if warning is None:
        assert expected["warnings"] == []
    else:
        assert warning in expected["warnings"][0]
    assert by_http(audio_server, data, options) == expected
    assert by_form(audio_server, data, options) == expected
    assert by_command(audio_bundle, data, options, tmp_path / "a.wav") == expected


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def test_the_open_inference_protocol(audio_server, audio_engine, module):
    address = audio_server.http if module is tritonclient.http else audio_server.grpc
    client = module.InferenceServerClient(address)
    cut = STEREO[: 44 + 4 * 5000]
    recordings = np.array([STEREO, cut], dtype=np.object_)
    tensor = module.InferInput("waveform", [2], "BYTES")
    tensor.set_data_from_numpy(recordings)
    for channel in ("1", 2):
        result = client.infer("tiny", [tensor], parameters={"channel": channel, "final_clip": "none"})
        query = Query(channel=int(channel), final_clip="none")
        parts = [
            pipeline.run_recording(audio_engine, partial(open_audio, each), query, ["logits"])[1]["logits"]
            for each in recordings
        ]
        np.testing.assert_array_equal(result.as_numpy("logits"), np.concatenate(parts))
        response = result.get_response()
        parameters = response["parameters"] if isinstance(response, dict) else response.parameters
        warnings = parameters["warnings"]
        (warning,) = json.loads(warnings if isinstance(warnings, str) else warnings.string_param)
        assert warning.startswith("recording 2: the recording ends early")
    client.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel": 3}, "channel is 3; expected 1 to 2, or mix"),
        ({"channel": "left"}, "channel is 'left'; expected a whole number, mix"),
        ({"channel": 0}, "channel is 0"),
        ({"final_clip": "some"}, "final_clip is 'some'; expected none, extend, remainder, full"),
    ],
)
def test_bad_options(audio_server, options, message):
    response = audio_server.post("/predict", content=STEREO, params=options)
    assert response.status_code == 400
    assert message in response.json()["error"]
