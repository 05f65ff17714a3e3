"""`python -m spaces_demo`, which is `llava demo`."""

import sys

from modeling_llava.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
