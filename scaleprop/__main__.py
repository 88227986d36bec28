"""``python -m scaleprop``: the command line."""

import sys

from scaleprop.cli import main

sys.exit(main())
