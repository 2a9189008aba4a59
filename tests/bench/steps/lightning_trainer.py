"""Lightning's Trainer, without logger, checkpoints and progress bar; no norm, no sums."""

from __future__ import annotations

from typing import Any

from torch.nn import functional

from tests.bench.steps.job import Job, run, sgd, start_group


def train(job: Job) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.build()

        def training_step(self, batch: Any, number: int) -> Any:
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self.model)

    start_group(job)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=job.processes,
        strategy="ddp" if job.processes > 1 else "auto",
        max_steps=-1,
        max_epochs=1,
        accumulate_grad_batches=job.accumulation,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), job.loader())


if __name__ == "__main__":
    run(train)
