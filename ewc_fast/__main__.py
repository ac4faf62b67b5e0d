"""``python -m ewc_fast``, the same as the command ``ewc-fast``."""

import sys

from ewc_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
