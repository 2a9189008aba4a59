"""What a user sees of a run while it trains: console, live view, W&B."""

from typing import TYPE_CHECKING

from distloop import hand_on

if TYPE_CHECKING:
    from distloop.tracking.trackers import Trackers as Trackers
else:
    __getattr__ = hand_on(__name__, __file__)
