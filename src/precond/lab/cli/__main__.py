"""``python -m precond.lab.cli`` is the command ``precond``."""

import sys

from precond.lab.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
