"""Evaluation against counting by hand."""

import numpy as np
import pytest
import torch

from pipeline.engine.evaluation import calibration_error, evaluate, predict


def test_accuracy_and_confusion_by_hand() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [2.0, 0, 0]])
    found = evaluate(logits, torch.tensor([0, 1, 0, 0]))
    assert found.accuracy == 0.75
    assert found.per_class[:2] == pytest.approx((2 / 3, 1.0))
    assert np.isnan(found.per_class[2])
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    plain = found.as_dict(("a", "b", "c"))
    assert plain["per_class"] == pytest.approx({"a": 2 / 3, "b": 1.0})


def test_calibration_error_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 4, generator=generator, dtype=torch.double).mul(2).softmax(1)
    labels = torch.randint(0, 4, (500,), generator=generator)
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap = (predicted[inside] == labels[inside]).double().mean() - confidence[inside].mean()
            expected += float(inside.sum()) / 500 * abs(float(gap))
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_a_perfectly_confident_right_model_has_no_error() -> None:
    labels = torch.tensor([0, 1, 2])
    assert calibration_error(torch.eye(3), labels) == 0
    assert calibration_error(torch.eye(3), labels.roll(1)) == 1


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.tensor([[float("nan"), 0]]), torch.tensor([0]), "finite"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"\[0, 2\), got 0 to 2"),
        (torch.zeros(2, 2), torch.tensor([0]), r"\(2, 2\) and \(1,\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "need logits"),
    ],
)
def test_bad_input(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(logits, labels)


def test_predict_is_in_eval_mode_and_restores_the_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Flatten())
    model.train()
    images = torch.ones(5, 2)
    assert torch.equal(predict(model, [images[:3], images[3:]], torch.device("cpu")), images)
    assert model.training
