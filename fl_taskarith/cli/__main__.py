"""`python -m fl_taskarith.cli` is the command `fl-taskarith`."""

import sys

from fl_taskarith.cli.command import main

sys.exit(main())
