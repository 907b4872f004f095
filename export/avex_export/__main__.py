"""``python -m avex_export``."""

import sys

from avex_export.cli import main

sys.exit(main())
