"""Store the embeddings of recordings, window by window and of several layers, in an .npz file.

    python extract_embeddings.py a.wav b.flac --layers last_layer -2 --output embeddings.npz

The file holds, for N windows of all recordings together:

- ``recordings``: the paths of the recordings, and ``recording`` (N,): the index of each window's recording;
- ``spans`` (N, 2): start and end of each window in its recording, in seconds;
- one array for each layer under the layer's name, (N, D), or (N, T, D) with ``--aggregation none``.

Without arguments, the program writes two synthetic recordings and uses them.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
import torch

from avex_serve import decode, load_model
from avex_serve.audio.reader import resample
from avex_serve.audio.windows import plan_windows
from avex_serve.models.aggregation import aggregate
from avex_serve.synthetic import make_recording

BATCH = 16


def main() -> None:
    """Read, cut, embed, write."""
    args = parse_arguments()
    files = args.recordings or write_recordings()
    if missing := [str(path) for path in files if not path.is_file()]:
        raise SystemExit(f"no recordings: {', '.join(missing)}; give files, such as FOLDER/*.wav")
    base = load_model(args.model, return_features_only=True)
    assert base.audio_config is not None
    rate = base.audio_config.sample_rate
    layers = base.resolve_layers([int(layer) if is_integer(layer) else layer for layer in args.layers])

    windows: list[np.ndarray] = []  # each (S,)
    spans, origins = [], []
    for i, path in enumerate(files):
        wave = resample(*decode(path), rate)
        plan = plan_windows(wave.size, base.clip_samples, rate, args.overlap)
        windows += plan.cut(wave)
        spans.append(plan.spans)
        origins += [i] * len(plan.starts)

    embeddings: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for batch in torch.from_numpy(np.stack(windows)).split(BATCH):
            for layer, embedding in base.taps(batch, layers).items():  # all layers in one pass
                embeddings[layer].append(aggregate(embedding, args.aggregation))
    arrays = {layer: torch.cat(parts).numpy() for layer, parts in embeddings.items()}
    paths = [str(path) for path in files]
    np.savez(args.output, recordings=paths, recording=origins, spans=np.concatenate(spans), **arrays)
    print(f"wrote {args.output}: {len(windows)} windows of {len(files)} recordings")
    for layer, array in arrays.items():
        print(f"  {layer}  {array.shape}")


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Store the embeddings of recordings in an .npz file.")
    parser.add_argument("recordings", type=Path, nargs="*", help="WAV, FLAC, OGG or MP3 (default: synthetic ones)")
    parser.add_argument("--model", default="avex_demo", help="the backbone, a registered name or a YAML file")
    parser.add_argument("--layers", nargs="+", default=["all"], help="names, indices, all, last_layer or backbone")
    parser.add_argument("--aggregation", choices=("mean", "max", "cls_token", "none"), default="mean")
    parser.add_argument("--overlap", type=float, default=0.0, help="of neighbouring windows, in seconds")
    parser.add_argument("--output", type=Path, default=Path("embeddings.npz"))
    return parser.parse_args()


def is_integer(text: str) -> bool:
    """Whether a layer is given by its index."""
    return text.removeprefix("-").isdigit()


def write_recordings() -> list[Path]:
    """Write two synthetic recordings of different sample rates."""
    files = []
    for seed, (seconds, rate) in enumerate([(9.0, 16000), (5.0, 44100)]):
        wave, _ = make_recording(seed, seconds=seconds, sample_rate=rate)
        files.append(Path(f"synthetic_{seed}.wav"))
        soundfile.write(files[-1], wave, rate)
    return files


if __name__ == "__main__":
    main()
