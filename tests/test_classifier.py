"""The linear classifier of plain supervision against torch's own cross-entropy, and its mistakes."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kladi.learn.classifier import LinearClassifier


def test_it_is_torchs_cross_entropy_of_a_linear_layer():
    torch.manual_seed(0)
    loss = LinearClassifier([9, 2, 5], dim=4).double()
    z = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([2, 5, 9, 9, 2, 5])
    column = torch.tensor([0, 1, 2, 2, 0, 1])
    want = (cross_entropy(loss.classifier(z[0]), column) + cross_entropy(loss.classifier(z[1]), column)) / 2
    assert loss(z, target).item() == pytest.approx(want.item())
    assert torch.autograd.gradcheck(lambda z: loss(z, target), (z,))
    assert set(loss.state_dict()) == {"classifier.weight", "classifier.bias"}


def test_no_rows_give_a_zero_that_keeps_its_graph():
    loss = LinearClassifier([0, 1], dim=3)
    z = torch.zeros(2, 0, 3, requires_grad=True)
    loss(z, torch.zeros(0, dtype=torch.int64)).backward()
    assert z.grad is not None


@pytest.mark.parametrize("target", [1, 4, 100])
def test_a_foreign_target_is_named(target):
    with pytest.raises(IndexError, match=f"target {target} is none of the 2 classes"):
        LinearClassifier([0, 3], dim=2)(torch.zeros(1, 1, 2), torch.tensor([target]))


@pytest.mark.parametrize("classes", [[], [1], [1, 1, 2]])
def test_impossible_classes_are_refused(classes):
    with pytest.raises(ValueError, match="two or more distinct"):
        LinearClassifier(classes, dim=2)
