"""Send hostile inputs to a service for as long as you like; what it doesn't stand is kept in the corpus.

python -m tests.fuzz --seconds 600
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.driver import BATCH, KINDS, Fault, inputs, siege

BUNDLES = 50  # in a round: they are loaded one after another


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", default=str(time.time_ns()), help="another one each time by default")
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all by default")
    arguments = parser.parse_args()
    end, sent, faults = time.monotonic() + arguments.seconds, Counter(), 0
    rounds = itertools.count()
    print(f"seed {arguments.seed}", flush=True)
    while time.monotonic() < end:
        try:
            with tempfile.TemporaryDirectory() as folder, siege(Path(folder)) as target:
                target.warm_up()
                for name in itertools.cycle(arguments.kinds or KINDS):
                    if time.monotonic() > end:
                        break
                    count = BUNDLES if name == "bundles" else BATCH
                    target.send(name, inputs(name, f"{arguments.seed} {next(rounds)}", count))
                    sent[name] += count
        except Fault as fault:
            faults += 1
            print(fault, flush=True)
    print(", ".join(f"{count} {name}" for name, count in sent.items()), f"; {faults} faults")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
