"""A task that collects of each validation sample: numbers, texts, and tensors of different shapes."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from distloop.data.fingerprint import add
from distloop.tasks import Classification


class Collecting(Classification):
    """Its digest changes with each bit, and with the order, of what came; its area under the ROC curve is no sum."""

    best = ("auroc", "max")

    def collect(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        images, labels = batch
        cut = [image.flatten()[: int(label)] for image, label in zip(images, labels, strict=True)]
        return {
            "scores": outputs.softmax(1),
            "labels": labels,
            "is_dark": (images.mean((1, 2, 3)) < 0).numpy(),
            "texts": [f"label {label}" for label in labels.tolist()],
            "cut": [{"pixels": pixels, "pair": (len(pixels), None)} for pixels in cut],
        }

    def summary(self, sums: dict[str, Tensor], collected: dict[str, Any]) -> dict[str, float]:  # type: ignore[override]
        digest = hashlib.sha256()
        add(digest, collected)
        labels, scores = collected["labels"], collected["scores"]
        assert [each["pair"] for each in collected["cut"]] == [(label, None) for label in labels.tolist()]
        assert collected["texts"] == [f"label {label}" for label in labels.tolist()]
        assert collected["is_dark"].dtype == torch.bool
        return {
            **super().summary(sums),
            "auroc": float(roc_auc_score(labels, scores, multi_class="ovr", labels=range(10))),
            "digest": int(digest.hexdigest()[:12], 16),
        }


class OneTooFew(Collecting):
    def collect(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        return {"scores": outputs[1:]}


class OfTheRank(Collecting):
    """The ranks collect under other names, where they are asked which they are."""

    def collect(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        return {f"scores_{os.environ['RANK']}": outputs}

    def summary(self, sums: dict[str, Tensor], collected: dict[str, Any]) -> dict[str, float]:  # type: ignore[override]
        return {**super(Collecting, self).summary(sums), "auroc": 0.5}
