"""``python -m omnimem``: the command line."""

from omnimem.cli import main

raise SystemExit(main())
