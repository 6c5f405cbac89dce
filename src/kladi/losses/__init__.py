"""What we optimise: a function first, then a thin module; usable in anyone's loop."""

from kladi.losses.label_prototypes import LevelAwareMarginLoss
from kladi.losses.label_tree import HierarchyWeightedContrastiveLoss

__all__ = ["HierarchyWeightedContrastiveLoss", "LevelAwareMarginLoss"]
