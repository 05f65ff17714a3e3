"""`python -m spaces_demo`, which is `llava demo`."""

import sys

from .command_line import main

sys.exit(main(["demo", *sys.argv[1:]]))
