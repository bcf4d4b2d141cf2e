"""Optimal transport between label spaces: ground cost, Sinkhorn, transport cost and gain. Pure torch."""
