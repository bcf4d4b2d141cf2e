"""An objective of one's own: the student puts the teachers' two likeliest classes into their order."""

import torch

from pipeline.distillation.step import Objective


class Order(Objective):
    """Hinge on the two classes that the teachers find likeliest: w · max(0, m - z_first + z_second), mean over images.

    w is how sure the teachers are of the image, z are the student's logits, m is `margin`.
    """

    needs = frozenset({"said"})  # what the teachers say of the taught images

    def __init__(self, about, *, margin=1.0):
        super().__init__()
        if margin <= 0:
            raise ValueError(f"margin must be > 0, got {margin}")
        self.margin = margin

    def forward(self, step):
        """Return the loss, and its parts to be recorded."""
        if step.said is None:  # nobody teaches: a control
            zero = torch.zeros(())
            return {"loss": zero, "order": zero}
        target, weight = step.said.mixed()  # (B, C_s) and (B,)
        likeliest = target.topk(2, dim=1).indices
        first, second = step.logits[step.taught].gather(1, likeliest).unbind(1)
        loss = (weight * (self.margin - first + second).clamp_min(0)).mean()
        return {"loss": loss, "order": loss.detach()}
