"""The clips that a probe can process: the shortest length, whether any length, and whether with a padding mask."""

from collections.abc import Sequence

import torch
from torch import Tensor

from avex_export.architectures import architecture_of
from avex_serve.errors import ExportError
from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import LSTMProbe, Probe, SequenceProbe

# Errors of probes that can't be built or can't process a clip, including errors of the user's own networks.
ERRORS = (ValueError, LookupError, RuntimeError, AssertionError, TypeError, ArithmeticError)


def check_clip(model: ModelBase, samples: int, rate: int) -> None:
    """Raise ExportError if a clip with this number of samples, at a rate in Hz, is too short for a backbone."""
    if samples < model.shortest_samples:
        raise ExportError(
            f"a clip of {samples} samples ({samples / rate:g} s) is too short: the shortest that {_name(model)} "
            f"takes has {model.shortest_samples}; give --clip-seconds {model.shortest_samples / rate:g} or more"
        )


def shortest_clip(probes: Sequence[Probe], samples: int, headless: bool) -> int:
    """Samples of the shortest clip that probes in eval mode process; ExportError unless they process any longer one.

    Args:
        probes: in eval mode.
        samples: of a clip that they process.
        headless: whether the graph returns the inputs of their heads.
    """
    if headless and any(probe.takes_sequence for probe in probes):
        raise ExportError(
            "--dynamic-length: the embeddings would be sequences of any length; give --clip-seconds instead, or "
            "export embeddings that are aggregated"
        )
    return max(_shortest_of(probe, samples) for probe in probes)


def _shortest_of(probe: Probe, samples: int) -> int:
    model = _backbone(probe)
    if model.fills_clips:
        raise ExportError(
            f"--dynamic-length: {_name(model)} cuts or fills every clip to one length itself, so it would ignore "
            "the rest of longer ones; give --clip-seconds instead"
        )
    if isinstance(probe, SequenceProbe) and probe.pos_encoding is not None and probe.pos_encoding.shape[1] > 1:
        raise ExportError(
            f"--dynamic-length: the head has positions for {probe.pos_encoding.shape[1]} steps, which limits the "
            "length of clips; give --clip-seconds instead, or train it with use_positional_encoding=False"
        )
    shortest = model.shortest_samples if model.shortest_samples > 1 else _found_by_trying(probe, samples)
    for length in (shortest, shortest + 1, 2 * samples + 1):
        if (why := _refusal(probe, length)) is not None:
            raise ExportError(
                f"--dynamic-length: the probe takes clips of {samples} samples, but not of {length}: {why}; give "
                "--clip-seconds instead"
            )
    return shortest


def _found_by_trying(probe: Probe, samples: int) -> int:
    """The shortest clip, by bisection, for a network that doesn't declare it."""
    low, high = 0, samples
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _refusal(probe, middle) is None else (middle, high)
    return high


def _refusal(probe: Probe, samples: int) -> str | None:
    """Why the probe can't process a clip of some samples; None if it can."""
    answer = _answer(probe, torch.zeros(1, samples))
    if isinstance(answer, str):
        return answer
    return None if all(output.isfinite().all() for output in answer) else "its answer is not finite"


def check_mask(probes: Sequence[Probe], samples: int) -> None:
    """Raise ExportError unless a padding mask changes the answers of probes to clips of some length."""
    model = _backbone(probes[0])
    if (why := architecture_of(model).refusals.get("--padding-mask")) is not None:
        raise ExportError(f"--padding-mask: {why}; leave it out")
    used = [_uses_mask(probe, samples) for probe in probes]  # of all probes, since each may raise
    if not any(used):
        raise ExportError(
            f"--padding-mask: it makes no difference to a probe on {_name(model)}; leave it out, or build the "
            'probe with extra_config {"exclude_padding": true}'
        )


def _uses_mask(probe: Probe, samples: int) -> bool:
    if isinstance(probe, LSTMProbe) and probe.exclude_padding:
        raise ExportError(
            "--padding-mask: an LSTM that excludes padding packs its sequences, which no graph can; leave it out"
        )
    clip = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(clip, dtype=torch.bool)
    whole = _answer(probe, clip, mask)
    mask[:, samples // 2 :] = True
    padded = _answer(probe, clip, mask)
    if isinstance(whole, str) or isinstance(padded, str):
        why = whole if isinstance(whole, str) else padded
        raise ExportError(f"--padding-mask: {_name(_backbone(probe))} doesn't take one ({why}); leave it out")
    return not all(torch.equal(one, other) for one, other in zip(whole, padded, strict=True))


@torch.no_grad()
def _answer(probe: Probe, clip: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...] | str:
    """Logits and pooled embedding, or the first line of the error."""
    try:
        features, padding = probe.combine(clip, mask)
        return probe.classify(features, padding), probe.pool(features, padding)
    except ERRORS as error:
        return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".;")


def _backbone(probe: Probe) -> ModelBase:
    assert probe.base_model is not None
    return probe.base_model


def _name(model: ModelBase) -> str:
    return type(model.called_module).__name__.removesuffix("Model")
