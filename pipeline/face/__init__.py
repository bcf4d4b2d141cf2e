"""The Python face: the stages as functions for a notebook or a script. Import its names from ``pipeline``."""
