"""The model card: the README.md of a bundle."""

from avex_export.assemble import Assembly
from avex_export.verify import Verification


def model_card(assembly: Assembly, verification: Verification, activation: str) -> str:
    """Markdown: what the bundle is, how to serve and call it, and how well its formats agree."""
    probe = assembly.probe
    kind = type(probe).__name__.removesuffix("Probe").lower()
    if assembly.clip_samples is None or assembly.sample_rate is None:
        takes = "Takes embeddings that the client brings."
        call = (
            """curl -H 'Content-Type: application/json' -d '{"embeddings": [[…]]}' http://localhost:3000/classify"""
        )
    else:
        seconds = assembly.clip_samples / assembly.sample_rate
        takes = (
            f"Hears {seconds:g} s at once, at {assembly.sample_rate} Hz; recordings of other rates are resampled."
        )
        call = "curl -F audio=@recording.wav http://localhost:3000/predict"
    untrained = "" if assembly.trained else "\n**The head is not trained: its weights are random.**\n"
    return f"""# {assembly.name}

A {kind} probe on the backbone `{assembly.model}`, layers {", ".join(f"`{layer}`" for layer in probe.layers)}.
{untrained}
{takes} Answers {len(assembly.labels)} labels with {activation} scores: {", ".join(assembly.labels[:20])}\
{" …" if len(assembly.labels) > 20 else ""}.

Licence of the weights: {assembly.licence}

## Use it

    AVEX_BUNDLE=. bentoml serve avex_serve.service:AvexService
    {call}

## Verification

Largest error of each format against the module it was exported from, relative to the largest output or to 1.

```
{verification.table()}
```
"""
