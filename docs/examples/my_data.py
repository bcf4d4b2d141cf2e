"""A source of one's own: contact sheets, one picture of many tiles, with the tiles' labels in a text file."""

from pathlib import Path

import numpy as np
from PIL import Image


def sheets(path, side=32):
    """Yield (image, label) for every tile of ``*.png``, row by row.

    Beside ``birds.png`` lies ``birds.txt``: the tiles' class names, separated by blanks, ``?`` where nobody knows.

    Parameters
    ----------
    path : str
        The folder.
    side : int
        Of a tile, in pixels.
    """
    for sheet in sorted(Path(path).glob("*.png")):
        pixels = np.asarray(Image.open(sheet).convert("RGB"))
        labels = sheet.with_suffix(".txt").read_text(encoding="utf-8").split()
        corners = [(top, left) for top in range(0, pixels.shape[0], side) for left in range(0, pixels.shape[1], side)]
        for (top, left), label in zip(corners, labels, strict=False):
            yield pixels[top : top + side, left : left + side], None if label == "?" else label
