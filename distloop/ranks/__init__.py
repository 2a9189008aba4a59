"""The processes that train together: who they are, how they meet, fail and stop."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.ranks.accelerator import build_accelerator as build_accelerator
    from distloop.ranks.ranks import Ranks as Ranks
    from distloop.ranks.sums import sum_over_ranks as sum_over_ranks
else:
    __getattr__ = hand_on(__name__, __file__)
