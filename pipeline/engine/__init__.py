"""The training loop, evaluation and checkpoints over one seam, the WorkerContext. Torch only."""
