"""One real inference before an engine counts as ready."""

import numpy as np

from avex_serve.errors import BundleError
from avex_serve.inference.engine import Engine


def warm_up(engine: Engine) -> None:
    """Answer once for silence, so that the first client doesn't wait for what is set up with the first inference.

    Raises:
        BundleError: the graph loads and doesn't answer.
    """
    manifest = engine.manifest
    try:
        if manifest.audio is not None:
            rate = manifest.audio.sample_rate
            engine.infer_recording(np.zeros(manifest.audio.window_samples, np.float32), rate)
        else:
            engine.infer(np.zeros([1 if size == -1 else size for size in manifest.inputs[0].shape], np.float32))
    except Exception as error:  # onnxruntime and torch raise errors of their own
        raise BundleError(f"bundle {manifest.name} loads, and fails to answer for silence: {error}") from error
