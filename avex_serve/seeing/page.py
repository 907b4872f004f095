"""HTML pages that need nothing else: no script, no other file and no network."""

import base64
import hashlib
import os
from pathlib import Path
from typing import Any, Final

from avex_serve import __version__
from avex_serve.audio.reader import Channel
from avex_serve.seeing import clips, pictures
from avex_serve.seeing.pictures import printable

STYLE: Final = "page.css"
CONTEXT: Final = 1.0  # seconds of a clip before and after what it shows
LONGEST: Final = 10.0  # seconds of what it shows


def illustrate(
    path: str | os.PathLike[str], start: float, end: float, frames: int | None, channel: Channel = "mix"
) -> dict[str, str]:
    """Picture and sound of a stretch of a recording, as the macro `example` takes them.

    Args:
        path: of the recording.
        start: seconds.
        end: seconds; of a long stretch, the first `LONGEST` are shown.
        frames: see `read_clip`.
        channel: see `read_clip`.

    Raises:
        AudioError, OSError: the recording can't be read.
    """
    end = min(end, start + LONGEST)
    first = max(0.0, start - CONTEXT)
    clip = clips.read_clip(path, first, end + CONTEXT, frames, channel)
    spectrogram = pictures.make_spectrogram([clip.wave], clip.sample_rate, first)
    return {
        "picture": clips.data_uri("image/webp", pictures.draw_clip(spectrogram, (start, end))),
        "sound": clips.data_uri("audio/mpeg", clips.as_mp3(clip)),
    }


def render(template: Path, **values: Any) -> str:
    """A page from a template that extends ``page.html.j2``, with macros from ``parts.html.j2``.

    All values are escaped. The policy of the page allows its own style sheet, and pictures and sounds in itself.
    """
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    here = Path(__file__).parent
    style = (here / STYLE).read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; media-src data:"
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(here), FileSystemLoader(template.parent)]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=shown,
    )
    return environment.get_template(template.name).render(
        values,
        style=Markup(style),
        policy=f"{policy}; base-uri 'none'; form-action 'none'",
        version=__version__,
    )
