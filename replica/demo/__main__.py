"""``python -m replica.demo``: see the package."""

import argparse
import random
import sys

from replica.demo.story import run


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="replica.demo",
        description="Two nodes on this machine: replicate, kill one, go on, resync, switch over; about half a minute.",
    )
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder in place")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="repeat these writes")
    return parser.parse_args()


if __name__ == "__main__":
    options = _parse()
    sys.exit(run(options.seed, options.keep))
