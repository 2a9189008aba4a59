"""The loop of distloop, which notes on each rank what was read beside its start, and what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

from distloop.config import Config
from distloop.ranks import Ranks
from distloop.train import train as loop


def train(config: Config, ranks: Ranks) -> None:
    asked_for: list[str] = []
    real = ranks.digests.of

    def of(path: Path) -> str:
        asked_for.append(path.name)
        return real(path)

    ranks.digests.of = of  # type: ignore[method-assign]
    loop(config, ranks)
    begun = sorted(path.name for path in ranks.digests._begun)
    Path(f"checksums.{ranks.rank}").write_text(json.dumps([begun, sorted(asked_for)]))
