"""Objectives that a student is trained with. Pure torch."""
