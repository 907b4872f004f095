"""Passes: rewriting the modules of probes before they are exported, so that the graph is faster.

Each works on a copy, changes the numbers by rounding only, and can be left out. They stand in the order in which
they are applied: later ones build on what earlier ones left.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from avex_export.passes.efficientnet import fold_batch_norms, fold_image_channels
from avex_export.passes.lowering import lower
from avex_export.passes.pooling import pool_before_tapped_operators
from avex_export.passes.spectra import fold_fourier_transform, fold_front_end
from avex_export.passes.target import Target
from avex_export.passes.transformers import bake_position_bias, fold_norms, merge_projections
from avex_export.passes.trimming import drop_dead_layers


@dataclass(frozen=True)
class Pass:
    """One rewriting."""

    name: str
    summary: str
    apply: Callable[[Target], bool]  # → whether there was anything to do


PASSES = (
    Pass("dead-layers", "leave out what comes after the tapped layers, and classifiers", drop_dead_layers),
    Pass("front-end", "fold the window of Kaldi's frames into the DFT's matrix", fold_front_end),
    Pass("fourier", "fold the real DFT of a spectrogram four ways by its symmetries", fold_fourier_transform),
    Pass("image", "convolve the spectrogram once instead of three equal channels", fold_image_channels),
    Pass(
        "position-bias", "bake the relative position bias and the positional convolution's norm", bake_position_bias
    ),
    Pass("projections", "one product for queries, keys, values and gates, with their scale", merge_projections),
    Pass("norms", "fold the residual's scale and the biases into the layer norms", fold_norms),
    Pass("pooling", "take the mean, or the first token, before tapped operators", pool_before_tapped_operators),
    Pass("batch-norm", "fold batch norms into the convolutions before them", fold_batch_norms),
)


# Not rewritings of modules, but of the ONNX graph that came of them.
CONSTANTS = "constants"
EXTERNAL_DATA = "external-data"
SUMMARIES = {each.name: each.summary for each in PASSES} | {
    CONSTANTS: "compute what depends on no input, transposed weights above all, before the ONNX graph is written",
    EXTERNAL_DATA: "write large weights of the ONNX graph beside it, to be mapped instead of read",
}


def rewrite(target: Target, without: Collection[str] = ()) -> list[str]:
    """Make copies of probes fit for export, in place; they can't be trained or saved any more.

    Args:
        target: in eval mode.
        without: names of passes to leave out.

    Returns:
        The names of the passes that had anything to do.
    """
    lower(target)
    return [each.name for each in PASSES if each.name not in without and each.apply(target)]


__all__ = ["CONSTANTS", "EXTERNAL_DATA", "PASSES", "SUMMARIES", "Pass", "Target", "rewrite"]
