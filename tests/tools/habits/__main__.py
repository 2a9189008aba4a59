"""Print the cases of these numbers."""

from __future__ import annotations

import sys

from tests.tools.habits import case_of

for word in sys.argv[1:]:
    print(case_of(int(word)))
