"""``python -m awares``: the same as the command ``awares``."""

import sys

from awares.cli.main import main

sys.exit(main())
