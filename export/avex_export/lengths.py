"""Which clips a probe can hear: how short they may be, whether any longer ones, and whether padded ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from avex_serve.errors import ExportError
from avex_serve.models.base_model import ModelBase
from avex_serve.models.efficientnet import EfficientNetModel
from avex_serve.models.probes import LSTMProbe, Probe, SequenceProbe

# What a probe raises that can't be built or can't hear a clip, as avex's does, and what a network of the user's own
# may beside that.
ERRORS = (ValueError, LookupError, RuntimeError, AssertionError, TypeError, ArithmeticError)


def check_clip(model: ModelBase, samples: int, rate: int) -> None:
    """Raise ExportError if a clip of so many samples, at a rate in Hz, is shorter than a backbone can hear."""
    if samples < model.shortest_samples:
        raise ExportError(
            f"a clip of {samples} samples ({samples / rate:g} s) is too short: the shortest that {_name(model)} "
            f"takes has {model.shortest_samples}; give --clip-seconds {model.shortest_samples / rate:g} or more"
        )


def shortest_clip(probes: Sequence[Probe], samples: int, headless: bool) -> int:
    """Samples of the shortest clip from which on probes answer clips of any length.

    Args:
        probes: in eval mode.
        samples: of a clip that they answer.
        headless: whether what their heads read is answered, too.

    Raises:
        ExportError: they don't.
    """
    for probe in probes:
        if headless and probe.takes_sequence:
            raise ExportError(
                "--dynamic-length: the embeddings that are answered would be sequences of any length; give "
                "--clip-seconds instead, or export embeddings that are aggregated"
            )
    return max(_shortest_of(probe, samples) for probe in probes)


def _shortest_of(probe: Probe, samples: int) -> int:
    model = probe.base_model
    assert model is not None
    if model.fills_clips:
        raise ExportError(
            f"--dynamic-length: {_name(model)} cuts or fills every clip to one length itself, so longer ones would "
            "not be heard; give --clip-seconds instead"
        )
    if isinstance(probe, SequenceProbe) and probe.pos_encoding is not None and probe.pos_encoding.shape[1] > 1:
        raise ExportError(
            f"--dynamic-length: the head has positions for {probe.pos_encoding.shape[1]} steps and can't hear "
            "longer clips; give --clip-seconds instead, or train it with use_positional_encoding=False"
        )
    shortest = model.shortest_samples if model.shortest_samples > 1 else _found_by_trying(probe, samples)
    for length in (shortest, shortest + 1, 2 * samples + 1):
        if (why := _refusal(probe, length)) is not None:
            raise ExportError(
                f"--dynamic-length: the probe answers clips of {samples} samples, but not of {length}: {why}; give "
                "--clip-seconds instead"
            )
    return shortest


def check_mask(probes: Sequence[Probe], samples: int) -> None:
    """Raise ExportError unless a padding mask makes a difference to what probes answer to clips of some length."""
    model = probes[0].base_model
    assert model is not None
    if isinstance(model, EfficientNetModel):
        raise ExportError(
            "--padding-mask: EfficientNet has no use for one, its convolutions hear every sample; leave it out"
        )
    heard = [_hears_mask(probe, samples) for probe in probes]
    if not any(heard):
        raise ExportError(
            f"--padding-mask: it makes no difference to a probe on {_name(model)}; leave it out, or build the "
            'probe with extra_config {"exclude_padding": true}'
        )


def _hears_mask(probe: Probe, samples: int) -> bool:
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
        assert probe.base_model is not None
        raise ExportError(f"--padding-mask: {_name(probe.base_model)} doesn't take one ({why}); leave it out")
    return not all(torch.equal(one, other) for one, other in zip(whole, padded, strict=True))


def _found_by_trying(probe: Probe, samples: int) -> int:
    """The shortest clip by halving, of a network that doesn't say."""
    low, high = 0, samples
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _refusal(probe, middle) is None else (middle, high)
    return high


def _refusal(probe: Probe, samples: int) -> str | None:
    """Why the probe doesn't answer a clip of so many samples; None if it does."""
    answer = _answer(probe, torch.zeros(1, samples))
    if isinstance(answer, str):
        return answer
    return None if all(output.isfinite().all() for output in answer) else "its answer is not finite"


@torch.no_grad()
def _answer(probe: Probe, clip: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...] | str:
    try:
        features, padding = probe.combine(clip, mask)
        return probe.classify(features, padding), probe.pool(features, padding)
    except ERRORS as error:
        return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".;")


def _name(model: ModelBase) -> str:
    return type(model.called_module).__name__.removesuffix("Model")
