"""``python -m omnimem.cli``."""

import sys

from omnimem.cli import main

sys.exit(main())
