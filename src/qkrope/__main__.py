"""`python -m qkrope` is the `qkrope` command."""

import sys

from qkrope.cli import main

if __name__ == "__main__":
    sys.exit(main())
