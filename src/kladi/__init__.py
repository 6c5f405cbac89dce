"""kladi: pretrain image encoders with the structure that medical data already carries, and measure what it bought.

The public names, one by one. They are imported at first use, so that `import kladi` and the command line stay light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kladi import evaluate, losses
    from kladi.models.factors.estimator import HierarchicalFactorModel
    from kladi.models.fused import load
    from kladi.structure.labelset import LabelSets
    from kladi.structure.lattice import Lattice
    from kladi.structure.taxonomy import Taxonomy

__version__ = "0.1.0"
__all__ = ["HierarchicalFactorModel", "LabelSets", "Lattice", "Taxonomy", "__version__", "evaluate", "load", "losses"]


def __getattr__(name: str) -> Any:
    if name == "Taxonomy":
        from kladi.structure.taxonomy import Taxonomy

        return Taxonomy
    if name == "LabelSets":
        from kladi.structure.labelset import LabelSets

        return LabelSets
    if name == "Lattice":
        from kladi.structure.lattice import Lattice

        return Lattice
    if name == "HierarchicalFactorModel":
        from kladi.models.factors.estimator import HierarchicalFactorModel

        return HierarchicalFactorModel
    if name == "load":
        from kladi.models.fused import load

        return load
    if name == "losses":
        import kladi.losses as module

        return module
    if name == "evaluate":
        import kladi.evaluate as module

        return module
    raise AttributeError(f"kladi has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
