"""python -m distloop.commands.report: the command without an installation."""

import sys

from distloop.commands.report.page import main

sys.exit(main())
