"""python -m distloop.report: the command without an installation."""

import sys

from distloop.report.page import main

sys.exit(main())
