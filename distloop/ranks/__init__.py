"""The processes that train together: who they are, how they meet, fail and stop."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.ranks.accelerator import build_accelerator
    from distloop.ranks.ranks import Ranks
    from distloop.ranks.sums import sum_over_ranks
else:
    __getattr__ = hand_on(__name__, __file__)
