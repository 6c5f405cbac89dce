"""What we optimise: a function first, then a thin module; usable in anyone's loop."""

from kladi.losses.himulcon import HiMulConLoss
from kladi.losses.label_prototypes import LevelAwareMarginLoss
from kladi.losses.label_tree import HierarchyWeightedContrastiveLoss
from kladi.losses.multi_label import MultiLabelContrastiveLoss, SupConLoss
from kladi.losses.subtree_sums import node_log_probs
from kladi.losses.tree_cross_entropy import (
    HierarchicalCrossEntropy,
    HierarchyAwareCrossEntropy,
    SoftLabelCrossEntropy,
)
from kladi.losses.views import BarlowTwinsLoss, BYOLLoss, DINOLoss, MoCoV3Loss, NTXentLoss

__all__ = [
    "BYOLLoss",
    "BarlowTwinsLoss",
    "DINOLoss",
    "HiMulConLoss",
    "HierarchicalCrossEntropy",
    "HierarchyAwareCrossEntropy",
    "HierarchyWeightedContrastiveLoss",
    "LevelAwareMarginLoss",
    "MoCoV3Loss",
    "MultiLabelContrastiveLoss",
    "NTXentLoss",
    "SoftLabelCrossEntropy",
    "SupConLoss",
    "node_log_probs",
]
