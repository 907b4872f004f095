"""``python -m avex_serve``."""

import sys

from avex_serve.cli import main

sys.exit(main())
