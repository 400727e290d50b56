"""``python -m awares``: the same as the command ``awares``."""

from awares.cli.main import main

raise SystemExit(main())
