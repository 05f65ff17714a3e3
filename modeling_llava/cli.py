"""`python -m modeling_llava.cli`, which is `llava`, for launchers that want a module (`accelerate launch -m`)."""

import sys

from spaces_demo.command_line import main

if __name__ == "__main__":
    sys.exit(main())
