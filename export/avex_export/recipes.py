"""Recipes: what ``--probe`` can name. The ten variants, a YAML file of one's own, or a saved probe."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from avex_serve.configs import ProbeConfig
from avex_serve.errors import NotFoundError
from avex_serve.models.probes import load_probe_config
from avex_serve.models.probes.storage import PROBE, SavedProbe, read_saved

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A probe to export: its name, its configuration, and its folder if it was saved."""

    name: str
    config: ProbeConfig
    folder: Path | None = None
    saved: SavedProbe | None = None


def variants() -> dict[str, str]:
    """The named variants and what each is, in one line."""
    lines = {path.stem: path.read_text("utf-8").splitlines()[0] for path in sorted(_FOLDER.glob("*.yml"))}
    return {name: line.removeprefix("# ") for name, line in lines.items()}


def find_recipe(probe: str) -> Recipe:
    """The probe that a user named.

    Args:
        probe: a variant such as ``linear_last``, the path of a YAML file, or a folder that save_probe wrote.

    Raises:
        NotFoundError: none of these.
        ValueError: a YAML file or folder that makes no probe.
    """
    path = Path(probe)
    if probe in variants():
        return Recipe(probe, load_probe_config(_FOLDER / f"{probe}.yml"))
    if path.is_dir() and (path / PROBE).is_file():
        saved = read_saved(path)
        return Recipe(path.resolve().name, saved.probe_config, path, saved)
    if path.is_file():
        return Recipe(path.stem, load_probe_config(path))
    close = difflib.get_close_matches(probe, variants(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise NotFoundError(
        f"no probe {probe!r}: {hint}expected one of {', '.join(variants())}, a YAML file, or a folder written by "
        "save_probe()"
    )
