"""``python -m amradio``."""

import sys

from amradio.cli import main

sys.exit(main())
