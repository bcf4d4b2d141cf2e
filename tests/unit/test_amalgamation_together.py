"""What a set of teachers says together: one view from joined embeddings."""

import pytest
import torch

from pipeline.amalgamation.together import fit_together, pseudo_labels, together_held_out
from pipeline.assessment.selection import select_set
from pipeline.transport.bridge import fit_bridge

CLASSES = 4


def embeddings(seed=0, each=12, noise=0.7):
    """Two teachers, each of which sees one bit of the class and is blind for the other; and one that sees nothing."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(each * CLASSES) % CLASSES
    bits = torch.stack([y % 2, y // 2], 1) * 2.0 - 1
    first = noise * torch.randn(len(y), 6, generator=g)
    second = noise * torch.randn(len(y), 3, generator=g)
    first[:, 0] += 2 * bits[:, 0]
    second[:, 1] += 2 * bits[:, 1]
    return [first, 1000 * second + 5, torch.randn(len(y), 5, generator=g)], y


def accuracy(p, y):
    return float((p.argmax(1) == y).double().mean())


def test_two_that_know_half_each_know_it_all_together():
    features, y = embeddings()
    unseen, truth = embeddings(seed=1, each=50)
    alone = [fit_together([one], y, CLASSES).distribution([new]) for one, new in zip(features, unseen, strict=True)]
    both = fit_together(features[:2], y, CLASSES).distribution(unseen[:2])
    torch.testing.assert_close(both.sum(1), torch.ones(len(truth)))
    assert accuracy(both, truth) > 0.95
    assert max(accuracy(one, truth) for one in alone) < 0.7


def test_what_disturbs_one_is_known_from_the_other():
    """No way to put together what each says alone gets there: the second one says nothing."""

    def disturbed(seed, each):
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(each * 2) % 2
        light = 5 * torch.randn(len(y), 1, generator=g)
        shown = torch.randn(len(y), 3, generator=g) * 0.3
        shown[:, :1] += y[:, None] * 2.0 - 1 + light
        return [shown, light + 0.05 * torch.randn(len(y), 1, generator=g)], y

    features, y = disturbed(0, 40)
    unseen, truth = disturbed(1, 100)
    first, second = (fit_together([one], y, 2).distribution([new]) for one, new in zip(features, unseen, strict=True))
    assert accuracy(first, truth) < 0.75 and accuracy(second, truth) < 0.6
    assert accuracy(fit_together(features, y, 2).distribution(unseen), truth) > 0.95


def test_it_is_the_centres_bridge_over_scaled_embeddings():
    features, y = embeddings()
    unseen, _ = embeddings(seed=1)

    def joined(of):
        parts = []
        for one, fitted in zip(of, features, strict=True):
            middle = fitted.mean(0)
            parts.append((one - middle) / (fitted - middle).norm(dim=1).mean())
        return torch.cat(parts, 1)

    bridge = fit_bridge("centres", logits=None, features=joined(features), labels=y, num_classes=CLASSES)
    found = fit_together(features, y, CLASSES)
    torch.testing.assert_close(found.distribution(unseen), bridge.distribution(None, joined(unseen)))
    torch.testing.assert_close(found.bridge.M, bridge.M)


def test_neither_the_unit_nor_the_origin_of_an_embedding_counts():
    features, y = embeddings()
    unseen, _ = embeddings(seed=1)
    changed = [features[0] * 1e-3 - 7, *features[1:]]
    said = fit_together(changed, y, CLASSES).distribution([unseen[0] * 1e-3 - 7, *unseen[1:]])
    torch.testing.assert_close(said, fit_together(features, y, CLASSES).distribution(unseen), atol=1e-3, rtol=0)


def test_what_is_held_out_was_not_fitted_on():
    features, y = embeddings(noise=1.5)
    told = accuracy(together_held_out(features, y, CLASSES), y)
    noise = [torch.randn(len(y), 40, generator=torch.Generator().manual_seed(3))]
    assert accuracy(fit_together(noise, y, CLASSES).distribution(noise), y) > 0.8  # it knows by heart what it has seen
    assert accuracy(together_held_out(noise, y, CLASSES), y) < 0.5
    assert told > 0.6


def test_the_only_sample_of_a_class_is_told_by_frequencies():
    features, y = embeddings()
    y[y == 3] = 0
    y[5] = 3
    p = together_held_out(features, y, CLASSES)
    torch.testing.assert_close(p[5], torch.bincount(y).float() / len(y))
    torch.testing.assert_close(p.sum(1), torch.ones(len(y)))


def test_a_teacher_that_sees_nothing_takes_nothing_away():
    features, y = embeddings()
    unseen, truth = embeddings(seed=1)
    blind = torch.zeros(len(y), 4)
    said = fit_together([*features[:2], blind], y, CLASSES).distribution([*unseen[:2], torch.zeros(len(truth), 4)])
    assert torch.isfinite(said).all() and accuracy(said, truth) > 0.9


def test_the_set_is_chosen_by_what_it_says_together():
    features, y = embeddings(noise=0.9)
    named = dict(zip(("low", "high", "noise"), features, strict=True))
    tried = []

    def together(members):
        tried.append(tuple(members))
        return together_held_out([named[name] for name in members], y, CLASSES)

    alone = {name: together([name]) for name in named}
    found = select_set(alone, y, together=together)
    assert set(found.chosen) == {"low", "high"}
    own = together_held_out(features[:2], y, CLASSES)
    assert found.score == pytest.approx(float(own.gather(1, y[:, None]).mean()), abs=1e-5)
    assert found.verdicts["noise"].reason in ("no marginal gain", "no relation")
    # No one but the best alone is tried in a set.
    tried.clear()
    best = max(alone, key=lambda name: float(alone[name].gather(1, y[:, None]).mean()))
    found = select_set(alone, y, together=together, consider=1)
    assert found.chosen == (best,) and not tried
    assert {one.reason for name, one in found.verdicts.items() if name != best} <= {
        "not among the best alone",
        "no relation",
    }


def test_what_the_budget_forbids_takes_no_place_among_the_considered():
    features, y = embeddings(noise=0.9)
    named = dict(zip(("low", "high", "noise"), features, strict=True))

    def together(members):
        assert "low" not in members
        return together_held_out([named[name] for name in members], y, CLASSES)

    alone = {name: together_held_out([one], y, CLASSES) for name, one in named.items()}
    sizes = {"low": 1000, "high": 10, "noise": 20}
    found = select_set(alone, y, together=together, parameters=sizes, max_params=50, consider=1)
    assert found.chosen == ("high",) and found.verdicts["low"].reason == "over budget"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: fit_together([], y, CLASSES), "at least one teacher, got none"),
        (lambda x, y: fit_together([x[0], x[1][:-1]], y, CLASSES), r"one N, got \(48, 6\), \(47, 3\)"),
        (lambda x, y: fit_together(x, y, CLASSES).distribution(x[:2]), "features must be of 3 teachers, got 2"),
        (lambda x, y: fit_together(x, y, 5), "class"),
        (lambda x, y: together_held_out([x[0] * float("nan")], y, CLASSES), "finite"),
        (lambda x, y: select_set({"a": torch.full((48, 4), 0.25)}, y, consider=0), "consider must be >= 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*embeddings())


def test_pseudo_labels_are_the_averages_and_lose_no_class() -> None:
    said = torch.tensor(
        [[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.7, 0.2]], [[0.6, 0.1, 0.3], [0.2, 0.6, 0.2], [0.1, 0.7, 0.2]]]
    )
    assert pseudo_labels(said[:, :, :2]).tolist() == [0, 1, 1]
    # Nobody is of class 2 by the average: the image that has most of it, of a class that can spare one.
    assert pseudo_labels(said).tolist() == [0, 1, 2]
    only = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]])
    assert pseudo_labels(only).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"at least C_s images, got \(1, 2, 3\)"):
        pseudo_labels(torch.full((1, 2, 3), 1 / 3))


def test_two_half_blind_teachers_together_see_more_than_their_average() -> None:
    """Each teacher separates its own two classes and takes the others' for one of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    features, said = [], []
    for own in ((0, 1), (2, 3)):
        place = torch.zeros(4, 8)
        for number, label in enumerate(own):
            place[label, number] = 3.0
        place[[one for one in range(4) if one not in own], 2] = 3.0  # what it does not know looks alike to it
        features.append(place[labels] + torch.randn(400, 8, generator=generator))
        p = torch.full((400, 4), 1e-6)
        p[:, list(own)] = (features[-1][:, :2] * 1.5).softmax(1)
        said.append(p / p.sum(1, keepdim=True))
    mean = float((torch.stack(said).mean(0).argmax(1) == labels).float().mean())
    view = fit_together(features, pseudo_labels(torch.stack(said)), 4)
    together = float((view.distribution(features).argmax(1) == labels).float().mean())
    assert together > mean + 0.05
