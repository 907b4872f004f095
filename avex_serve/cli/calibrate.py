"""``avex-serve calibrate``: probabilities and thresholds of a bundle from reviewed detections."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.cli.fit import given_options
from avex_serve.cli.output import note

if TYPE_CHECKING:
    from avex_serve.bundles.manifest import ProbeInfo


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "calibrate",
        help="fit a bundle's probabilities and thresholds to your reviewed detections",
        argument_default=argparse.SUPPRESS,  # the defaults are those of `CalibrationRequest`
        description="Fit a bundle's probabilities and thresholds to detections that you have reviewed, and write a "
        "new version of the bundle with the same graphs. LABELS are tables (CSV, or Raven's) with the columns file, "
        "start, end, label and decision (present, absent or unsure) or correct (yes or no). Review a random part of "
        "the detections from a low score on.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("bundle", help="made by avex-export: a folder or a URL, such as hf://owner/name")
    parser.add_argument("labels", type=Path, nargs="+", metavar="LABELS", help="tables of reviewed detections")
    parser.add_argument("--output", type=Path, help="folder of the new bundle (default: BUNDLE-VERSION, next to it)")
    parser.add_argument("--bundle-version", metavar="VERSION", help="of the new bundle (default: the next number)")
    parser.add_argument("--probe", help="which head of the bundle (default: the first)")
    scores = parser.add_argument_group("scores of the reviewed detections", "By default the recordings are run.")
    scores.add_argument("--recordings", type=Path, metavar="DIR", help="where they are, if not next to LABELS")
    scores.add_argument("--overlap", type=float, help="of neighbouring windows, in seconds (default: 0)")
    scores.add_argument("--run", dest="store", type=Path, metavar="DIR", help="take them from what run has stored")
    scores.add_argument("--table-scores", action="store_true", help="take them from the column score of LABELS")
    parser.add_argument(
        "--target-precision", type=float, metavar="SHARE", help="of the detections above thresholds (default: 0.9)"
    )
    parser.add_argument("--seed", type=int, help="of the resampling for intervals (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Write the new bundle, and print its thresholds."""
    from avex_serve.archive.calibrate import CalibrationRequest, calibrate_bundle

    request = CalibrationRequest(**given_options(arguments, CalibrationRequest))
    bundle = calibrate_bundle(request, note)
    name = request.probe or bundle.manifest.probes[0].name
    print(_table(next(probe for probe in bundle.manifest.probes if probe.name == name)))
    print(f"wrote {bundle.directory}, version {bundle.manifest.version} of {bundle.manifest.name}", file=sys.stderr)
    return 0


def _table(probe: "ProbeInfo") -> str:
    """A line for each label with a probability."""
    from avex_serve.calibration.scales import Calibrator

    assert probe.calibration is not None
    lowest = Calibrator.of(probe.calibration, probe.activation).lowest.tolist()
    lines = [f"{'':24} {'present':>8} {'absent':>8} {'recordings':>10}  {'threshold':>9}  precision from there on"]
    for each, score in zip(probe.calibration.labels, lowest, strict=True):
        if each.scale is None:
            continue
        found = each.threshold
        limit, precision = "–", each.reason or ""
        if found is not None:
            low, high = found.precision_interval
            limit, precision = f"{score:.3f}", f"{found.precision:.2f} ({low:.2f}–{high:.2f})"
        counts = f"{each.with_sound:8} {each.without_sound:8} {each.recordings:10}"
        lines.append(f"{each.label[:24]:24} {counts}  {limit:>9}  {precision}")
    return "\n".join(lines)
