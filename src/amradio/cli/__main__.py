"""``python -m amradio.cli``."""

import sys

from amradio.cli import main

sys.exit(main())
