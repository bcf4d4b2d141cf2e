"""A score of one's own: how far the classes lie apart in a teacher's features, measured against their width."""

import torch


def separation(features, labels, num_classes, *, power=1.0):
    """Mean over images of (d_other - d_own) / (d_other + d_own), in [-1, 1].

    d_own is the distance to the centre of the image's own class, d_other that to the nearest other centre.

    Parameters
    ----------
    features : (N, D) tensor
    labels : (N,) tensor
    num_classes : int
    power : float
        Of the distances.
    """
    features = features.float()
    centres = torch.stack([features[labels == label].mean(0) for label in range(num_classes)])
    distances = torch.cdist(features, centres) ** power
    own = torch.nn.functional.one_hot(labels.long(), num_classes).bool()
    d_own = distances[own]
    d_other = distances.masked_fill(own, float("inf")).min(1).values
    return float(((d_other - d_own) / (d_other + d_own).clamp_min(1e-12)).mean())
