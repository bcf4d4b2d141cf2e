import math
import types

import numpy as np
import pytest
import torch

from pipeline.distillation.step import Head
from pipeline.engine.evaluation import evaluate, evaluate_heads
from pipeline.errors import ConfigError
from pipeline.settings_files import load_settings
from pipeline.stages.gate import credit, fingerprint_of, paired
from pipeline.stages.model_card import licence_warnings
from pipeline.tracking.spec import RegisterSpec
from tests.tiny import make_settings


def test_the_mean_credit_is_the_accuracy():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    found = credit(logits, labels, ())
    assert float(found.mean()) == pytest.approx(evaluate(logits, labels).accuracy)
    assert set(found.tolist()) == {0.0, 1.0}


def test_the_mean_credit_of_several_heads_is_their_mean_accuracy():
    torch.manual_seed(1)
    # The second head knows classes 2 and 3 alone: it has other images than the first, and fewer.
    heads = (Head("all", slice(0, 2), (0, 0, 1, 1)), Head("some", slice(2, 4), (-1, -1, 0, 1)))
    logits, labels = torch.randn(60, 4), torch.randint(4, (60,))
    found = credit(logits, labels, heads)
    assert float(found.mean()) == pytest.approx(evaluate_heads(logits, labels, heads).accuracy)
    wrong = -torch.ones(60, 4)
    for row, label in enumerate(labels.tolist()):
        wrong[row, 0 if label >= 2 else 1] = 1  # the first head is wrong everywhere
        wrong[row, 2 if label == 3 else 3] = 1
    assert credit(wrong, labels, heads).sum() == 0


def test_the_paired_difference_and_its_error():
    random = np.random.default_rng(0)
    ours, theirs = (torch.from_numpy(random.integers(0, 2, 40).astype(float)) for _ in range(2))
    gap, error = paired(ours, theirs)
    assert gap == pytest.approx(float(ours.mean() - theirs.mean()))
    assert error == pytest.approx(np.std((ours - theirs).numpy(), ddof=1) / math.sqrt(40))
    assert paired(ours, ours) == (0.0, 0.0)
    assert paired(ours[:1], theirs[:1])[1] == math.inf  # one image says nothing of the spread


def split(ids, labels, classes=("a", "b"), shape=(1, 4, 4)):
    return types.SimpleNamespace(
        raw_ids=np.array(ids, np.uint8), labels=torch.tensor(labels), classes=classes, image_shape=shape
    )


def test_the_test_fingerprint_depends_on_the_images_and_not_on_their_order():
    ids = np.random.default_rng(0).integers(0, 256, (5, 16))
    ids[1, :15] = ids[0, :15]  # told apart by the last byte alone
    ids[:2, 15] = 1, 0
    labels = np.array([0, 1, 0, 1, 1])
    own = fingerprint_of(split(ids, labels))
    for order in ([1, 0, 2, 3, 4], [4, 3, 2, 1, 0]):
        assert fingerprint_of(split(ids[order], labels[order])) == own
    swapped = labels.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    others = [
        split(ids, swapped),
        split(ids[:4], labels[:4]),
        split(ids, labels, classes=("b", "a")),
        split(ids, labels, shape=(1, 8, 8)),
    ]
    assert len({own, *map(fingerprint_of, others)}) == 5


@pytest.mark.parametrize(
    ("licence", "part"),
    [
        ("Apache-2.0", None),
        ("NCSA", None),
        ("CC-BY-4.0", None),
        ("CC-BY-NC-4.0", "excludes commercial use"),
        ("cc-by-nc-sa-4.0", "excludes commercial use"),
        ("non-commercial use", "excludes commercial use"),
        ("Noncommercial research licence", "excludes commercial use"),
        ("for research only", "excludes commercial use"),
        ("academic use only", "excludes commercial use"),
        ("", "no licence is stated"),
        ("  ", "no licence is stated"),
    ],
)
def test_a_licence_is_warned_of_when_it_says_so_itself(licence, part):
    found = licence_warnings({"t": {"licence": licence}})
    assert (not found) if part is None else (len(found) == 1 and part in found[0])


def test_one_alias_can_not_be_both_challenger_and_champion(tmp_path):
    with pytest.raises(ConfigError, match=r"`register`: `alias` and `champion` are both 'live'; they must differ"):
        load_settings([make_settings(tmp_path)], ["register.alias=live", "register.champion=live"])
    assert RegisterSpec(alias="staging", champion="production").champion == "production"
