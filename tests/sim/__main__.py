"""`python -m tests.sim --seeds N --start S [--canary NAME]`."""

import sys
import warnings

from tests.sim.run import main

warnings.simplefilter("ignore")  # coroutines of dead incarnations that were never awaited
sys.exit(main())
