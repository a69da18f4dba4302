"""`python -m tests.sim --seeds N --start S [--jobs J] [--canary NAME]`."""

import sys

from tests.sim.campaign import main

if __name__ == "__main__":
    sys.exit(main())
