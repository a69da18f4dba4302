"""``python -m replica.cli``: the same as ``replicactl``."""

import sys

from replica.cli import main

sys.exit(main())
