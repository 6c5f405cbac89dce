"""Small networks trained with SupCon, with a tree and with a shuffled one; a process of its own, without type checks.

Prints {arm: [[violation rate, top-1] for each seed]}; takes the number of seeds.
"""

import json
import sys

import numpy as np
import torch

from kladi.evaluate import metrics
from kladi.losses import HierarchyWeightedContrastiveLoss, LevelAwareMarginLoss
from kladi.structure.taxonomy import Taxonomy

ARMS = ("supcon", "tree", "shuffled")


def trained_violation_rate(seed: int, arm: str, tax: Taxonomy) -> tuple[float, float]:
    """Violation rate and top-1 on test rows of 12 Gaussians whose own positions know nothing of the tree."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(12, 16, generator=generator)
    leaves = torch.from_numpy(np.array(tax.leaves))

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.randint(12, (n,), generator=generator)
        return means[label] + 0.8 * torch.randn(n, 16, generator=generator), label

    (x, label), (x_test, label_test) = draw(600), draw(1500)
    first, second = torch.nn.Linear(16, 64), torch.nn.Linear(64, 8)
    for layer in (first, second):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        torch.nn.init.zeros_(layer.bias)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    # The shuffled tree deals the leaves of each parent to all parents: no pair of kin is kept.
    node = leaves[torch.arange(12).reshape(3, 4).T.reshape(-1)] if arm == "shuffled" else leaves
    strength = 0.0 if arm == "supcon" else 0.5
    contrast = HierarchyWeightedContrastiveLoss(tax, 0.2, strength, strength)
    margin = LevelAwareMarginLoss(tax, 8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(100):
        pick = torch.randint(600, (128,), generator=generator)
        views = x[pick] + 0.1 * torch.randn(2, 128, 16, generator=generator)
        z, target = net(views), node[label[pick]]
        loss = contrast(z, target) + (0.5 * margin(z, target) if arm != "supcon" else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        z, z_test = net(x), torch.nn.functional.normalize(net(x_test), dim=1)
    prototypes = metrics.node_prototypes(z, leaves[label], tax)
    nearest = (z_test.double() @ torch.from_numpy(prototypes[0])[leaves].T).argmax(1)
    rate = metrics.parent_violation_rate(z_test, leaves[label_test], tax, prototypes=prototypes)
    return rate, metrics.accuracy(nearest, label_test)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tree = Taxonomy.from_paths([f"{top}/{leaf}" for top in "abc" for leaf in "wxyz"])
    seeds = range(int(sys.argv[1]))
    print(json.dumps({arm: [trained_violation_rate(seed, arm, tree) for seed in seeds] for arm in ARMS}))
