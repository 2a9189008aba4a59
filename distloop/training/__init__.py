"""What a step computes: models, tasks, optimizers, gradients, losses, validation."""
