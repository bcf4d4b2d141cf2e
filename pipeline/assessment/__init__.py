"""Transferability scores, ranking and choice of the set. Pure torch."""
