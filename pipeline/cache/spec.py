"""Settings of the cache of teacher outputs. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.strict import StrictModel

Precision = Literal["fp16", "fp32"]


class CacheSpec(StrictModel):
    """Where the outputs of teachers are kept, how much of them, and how exactly.

    Runs, trials and machines that name the same folder share what is in it.
    """

    path: str | None = Field(None, description="folder, may be shared by machines; null: a folder beside the runs")
    quota_gb: float = Field(50, gt=0, description="GB (10⁹ bytes); above it the least recently used outputs go")
    precision: Precision = Field("fp16", description="of stored values; fp16 halves the space")
    top_k: int | None = Field(
        None, ge=1, description="keep each image's k largest logits and the mass of the others; null: all"
    )

    @property
    def quota_bytes(self) -> int:
        """The quota in bytes."""
        return int(self.quota_gb * 1e9)
