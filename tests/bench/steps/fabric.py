"""Lightning Fabric: a loop of one's own around its setup; no norm, no sums."""

from __future__ import annotations

from torch.nn import functional

from tests.bench.steps.job import Job, run, sgd, start_group


def train(job: Job) -> None:
    from lightning.fabric import Fabric

    start_group(job)
    fabric = Fabric(accelerator="cpu", devices=job.processes, strategy="ddp" if job.processes > 1 else "auto")
    fabric.launch()
    bare = job.build()
    model, optimizer = fabric.setup(bare, sgd(bare))
    model.train()
    loader = fabric.setup_dataloaders(job.loader(), use_distributed_sampler=False)
    for number, (inputs, targets) in enumerate(loader, 1):
        is_last = number % job.accumulation == 0
        with fabric.no_backward_sync(model, enabled=not is_last):
            fabric.backward(functional.cross_entropy(model(inputs), targets) / job.accumulation)
        if is_last:
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    run(train)
