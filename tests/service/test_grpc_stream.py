"""ModelStreamInfer, asked with Triton's client; the engine and single calls are the oracles."""

import contextlib
import json
import queue
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from avex_serve.audio.reader import decode
from tests.bundles import LABELS
from tests.clients import until
from tests.service.conftest import encode, running_server
from tests.service.test_stream import LONG, logged

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
PATIENCE = 60
SHORT = encode(0.1, 16000, 1, "WAV")


def recordings(*audio):
    tensor = triton.InferInput("waveform", [len(audio)], "BYTES")
    tensor.set_data_from_numpy(np.array(audio, dtype=np.object_))
    return tensor


def parameters(result):
    response = result.get_response()
    return {name: getattr(each, each.WhichOneof("parameter_choice")) for name, each in response.parameters.items()}


@contextlib.contextmanager
def streaming(server):
    """A client with a stream, and a function that sends a request and returns its answers until the last one."""
    answers = queue.SimpleQueue()
    with triton.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))

        def ask(model, *inputs, **options):
            client.async_stream_infer(model, list(inputs), **options)
            got = []
            while not got or not parameters(got[-1]).get("triton_final_response"):
                result, error = answers.get(timeout=PATIENCE)
                if error is not None:
                    raise error
                got.append(result)
            return got

        yield client, ask, answers
        client.stop_stream()


def rows(answers, name):
    return np.concatenate([each.as_numpy(name) for each in answers])


def test_recordings_come_in_parts(audio_server, audio_engine, wav, recording):
    with streaming(audio_server) as (_, ask, _):
        answers = ask("tiny", recordings(wav, recording), parameters={"hop": 0.05}, request_id="7")
        again = ask("tiny", recordings(wav), parameters={"hop": 0.05})
    expected = [audio_engine.score(*decode(each), hop=0.05) for each in (wav, recording)]
    np.testing.assert_array_equal(rows(answers, "scores"), np.concatenate([each.scores for each in expected]))
    np.testing.assert_array_equal(rows(again, "scores"), expected[0].scores)
    spans = [
        (parameters(each)["recording"], *span) for each in answers for span in json.loads(parameters(each)["spans"])
    ]
    assert spans == [(number, *span) for number, each in enumerate(expected, 1) for span in each.spans.tolist()]
    assert {each.get_response().id for each in answers} == {"7"}
    assert len(answers) > 2


def test_windows_are_one_part(audio_server, audio_engine):
    windows = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 1600)).astype(np.float32)
    tensor = triton.InferInput("waveform", windows.shape, "FP32")
    tensor.set_data_from_numpy(windows)
    with streaming(audio_server) as (_, ask, _):
        (answer,) = ask("tiny", tensor, outputs=[triton.InferRequestedOutput("logits")])
    np.testing.assert_array_equal(answer.as_numpy("logits"), audio_engine.infer(windows)["logits"])


OPTIONS = (
    {"top_k": 1, "hop": 0.04},
    {"threshold": 0.5, "merge": 0.0, "merge_score": "mean"},
    {"label": json.dumps(LABELS[1:]), "threshold": 0.3, "final_clip": "full"},
    {"label": LABELS[0], "threshold": 0},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_detections_are_those_of_predict(audio_server, recording, options):
    asked = [("label", each) for each in LABELS[1:]] if options.get("label", "").startswith("[") else None
    rest = [(name, each) for name, each in options.items() if asked is None or name != "label"]
    document = audio_server.post("/predict", content=recording, params=[*(asked or ()), *rest]).json()
    wanted = [triton.InferRequestedOutput("detections")]
    with streaming(audio_server) as (client, ask, _):
        parts = ask("tiny", recordings(recording), parameters=options, outputs=wanted)
        single = client.infer("tiny", [recordings(recording, recording)], parameters=options, outputs=wanted)
    order = lambda one: (one["start"], one["label"])  # noqa: E731
    streamed = [json.loads(each) for part in parts for each in part.as_numpy("detections")]
    assert sorted(streamed, key=order) == sorted(document["detections"], key=order)
    assert [json.loads(each) for each in single.as_numpy("detections")] == 2 * document["detections"]
    assert json.loads(parameters(single)["detections"]) == 2 * [len(document["detections"])]


def test_an_error_ends_its_request_and_not_the_stream(audio_server, audio_engine, wav):
    with streaming(audio_server) as (_, ask, _):
        for model, audio, options, reason in (
            ("nothing", wav, {}, "nothing"),
            ("tiny", b"no audio", {}, "can't be decoded"),
            ("tiny", wav, {"overlap": 7.0}, "overlap is 7.0"),
        ):
            with pytest.raises(triton.InferenceServerException, match=reason):
                ask(model, recordings(audio), parameters=options)
        answers = ask("tiny", recordings(wav))
    np.testing.assert_array_equal(rows(answers, "scores"), audio_engine.score(*decode(wav)).scores)


def test_warnings_are_in_the_last_part(audio_server):
    audio = encode(1, 16000, 1, "WAV")
    with streaming(audio_server) as (_, ask, _):
        *others, last = ask("tiny", recordings(audio[: len(audio) // 2]))
    assert "ends" in json.loads(parameters(last)["warnings"])[0]
    assert all("warnings" not in parameters(each) for each in others)


def test_a_stream_without_requests(audio_server):
    with grpc.insecure_channel(audio_server.grpc) as channel:
        assert list(channel.stream_stream(METHOD)(iter(()), timeout=PATIENCE)) == []


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory, slow_bundle):
    """One slot, no queue, tens of milliseconds a window, four seconds for an answer or a message, a key."""
    settings = {
        "AVEX_CONCURRENCY": "1",
        "AVEX_QUEUE": "0",
        "AVEX_THREADS": "1",
        "AVEX_LOG_FORMAT": "json",
        "AVEX_TIMEOUT_SECONDS": "4",
        "AVEX_READ_TIMEOUT_SECONDS": "4",
        "AVEX_API_KEYS": "secret",
        "AVEX_RELOAD_SECONDS": "0",
    }
    with running_server(tmp_path_factory.mktemp("slow"), AVEX_BUNDLE=str(slow_bundle), **settings) as server:
        yield server


def call(channel, messages, key="secret", identity="stream-1"):
    metadata = (("authorization", f"Bearer {key}"), ("x-request-id", identity))
    return channel.stream_stream(METHOD)(messages, timeout=PATIENCE, metadata=metadata)


def message(audio, identity=""):
    request = service_pb2.ModelInferRequest(model_name="slow", id=identity)
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    request.outputs.add(name="scores")
    request.raw_input_contents.append(len(audio).to_bytes(4, "little") + audio)
    return request.SerializeToString()


def answered(channel):
    """What a short recording gets, or None while the slot is taken."""
    with contextlib.suppress(grpc.RpcError):
        return list(call(channel, iter([message(SHORT)]), identity="next"))


class Identified:
    def __init__(self, identity):
        self.headers = {"x-request-id": identity}


def test_a_late_answer_says_that_it_is_a_part(slow_server):
    answers = queue.SimpleQueue()

    def messages():
        yield message(LONG, "long")
        until(lambda: not answers.empty())
        until(lambda: answered(channel))  # the work ends at its next step, and then frees its slot
        yield message(SHORT, "short")

    data = []
    with grpc.insecure_channel(slow_server.grpc) as channel:
        for each in call(channel, messages(), identity="late"):
            data.append(each)
            if service_pb2.ModelStreamInferResponse.FromString(each).error_message:
                answers.put(None)
    parts = [service_pb2.ModelStreamInferResponse.FromString(each) for each in data]
    *whole, failure, last = parts
    assert whole
    assert all(each.infer_response.id == "long" and not each.error_message for each in whole)
    assert "in time" in failure.error_message
    assert "part of the answer" in failure.error_message
    assert failure.infer_response.id == "long"
    assert (last.infer_response.id, last.error_message) == ("short", "")
    assert until(lambda: logged(slow_server, Identified("late")))["status"] == "DEADLINE_EXCEEDED"


def test_a_client_that_goes_ends_the_work(slow_server):
    with grpc.insecure_channel(slow_server.grpc) as channel:
        running = call(channel, iter([message(LONG)]), identity="gone")
        next(running)
        with pytest.raises(grpc.RpcError) as refused:
            next(call(channel, iter([message(SHORT)]), identity="busy"))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        running.cancel()
        line = until(lambda: logged(slow_server, Identified("gone")))
        assert line["status"] == "CANCELLED"
        assert line["batches"] < 300, "of 580"
        assert len(until(lambda: answered(channel))) == 1


def test_keys_and_pauses(slow_server):
    with grpc.insecure_channel(slow_server.grpc) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            next(call(channel, iter([message(LONG)]), key="other"))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

        def pausing():
            yield message(SHORT)
            time.sleep(6)

        with pytest.raises(grpc.RpcError) as ended:
            list(call(channel, pausing()))
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_garbage_is_answered_by_a_message(slow_server):
    with grpc.insecure_channel(slow_server.grpc) as channel:
        (answer,) = call(channel, iter([b"\xff"]), identity="garbage")
    answer = service_pb2.ModelStreamInferResponse.FromString(answer)
    assert answer.error_message
    assert not answer.infer_response.outputs
