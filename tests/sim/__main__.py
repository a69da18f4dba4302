"""`python -m tests.sim --seeds N --start S [--jobs J] [--canary NAME]`."""

import sys
import warnings

from tests.sim.campaign import main

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # coroutines of dead incarnations that were never awaited
    sys.exit(main())
