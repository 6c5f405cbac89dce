"""What we optimise: a function first, then a thin module; usable in anyone's loop."""

from kladi.losses.himulcon import HiMulConLoss
from kladi.losses.label_prototypes import LevelAwareMarginLoss
from kladi.losses.label_tree import HierarchyWeightedContrastiveLoss
from kladi.losses.multi_label import MultiLabelContrastiveLoss, SupConLoss
from kladi.losses.views import NTXentLoss

__all__ = [
    "HiMulConLoss",
    "HierarchyWeightedContrastiveLoss",
    "LevelAwareMarginLoss",
    "MultiLabelContrastiveLoss",
    "NTXentLoss",
    "SupConLoss",
]
