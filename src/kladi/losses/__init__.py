"""What we optimise: a function first, then a thin module; usable in anyone's loop."""

from kladi.losses.label_tree import HierarchyWeightedContrastiveLoss, LevelAwareMarginLoss

__all__ = ["HierarchyWeightedContrastiveLoss", "LevelAwareMarginLoss"]
