"""All formats by the name that ``--format`` takes."""

from typing import Final

from avex_serve.annotations import aoef, audacity, birdnet, camtrap_dp, kaleidoscope, long, raven
from avex_serve.annotations.table import Format

FORMATS: Final[dict[str, Format]] = {
    one.name: one
    for one in (
        *long.FORMATS,
        raven.FORMAT,
        audacity.FORMAT,
        birdnet.FORMAT,
        kaleidoscope.FORMAT,
        aoef.FORMAT,
        camtrap_dp.FORMAT,
    )
}
