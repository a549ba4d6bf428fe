"""``python -m bench``."""

import sys

from bench.cli import command

sys.exit(command())
