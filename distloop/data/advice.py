"""What to do about a loop that waits for its data."""

from collections.abc import Mapping

from distloop.config.settings import Data
from distloop.data.datasets import DataSource
from distloop.data.loader import worker_count
from distloop.data.whole_batches import gives_batches

MOST_SHARE = 0.1  # of the time of steps
LEAST_SECONDS = 5.0  # nobody would gain from advice on less


def advice(seconds: Mapping[str, float], config: Data, source: DataSource) -> list[str]:
    """A line for the end of an attempt in which the loop has waited for more than a tenth of the time of its steps;
    else none, and none for data in memory, which nothing makes faster. `seconds`: the attempt's, by account."""
    waited, steps = seconds["data"], seconds["data"] + seconds["compute"]
    workers = worker_count(config, source.train)
    if waited < LEAST_SECONDS or waited <= MOST_SHARE * steps or (gives_batches(source.train) and not workers):
        return []
    others = ""
    if config.name == "image_folder":
        faster = "" if config.args.get("decoder") == "torchvision" else "--data.args.decoder torchvision, or "
        others = f"; {faster}`distloop pack`"
    return [
        f"  data wait: {waited / steps:.0%} of the time of steps. More loader processes may help (data.workers, "
        f"{workers} now){others}: docs/speed.md, Pictures and other data"
    ]
