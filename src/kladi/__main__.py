"""`python -m kladi` is the command `kladi`."""

from kladi.cli import main

raise SystemExit(main())
