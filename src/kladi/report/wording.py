"""Names and numbers as the page writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# As evaluate/answers.py says, which the report cannot ask without importing torch; a test holds the two together.
LOWER_IS_BETTER = {
    "calibration_error",
    "hierarchical_distance_at_1",
    "hierarchical_distance_at_5",
    "least_cost_distance",
    "mistake_severity",
    "parent_violation_rate",
    "tree_distance_at_1",
    "tree_distance_at_5",
    "tree_distance_at_10",
}


def words(metric: str) -> str:
    """`balanced_accuracy` -> `balanced accuracy`, with a word where less of it is better."""
    text = metric.replace("_", " ").replace("hierarchical f1", "hierarchical F1")
    text = "AUC" if text == "auc" else text
    return text + (" (lower is better)" if metric in LOWER_IS_BETTER else "")


def number(value: float | None) -> str:
    """Three places; nothing where there is none."""
    return "" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """The same with its sign."""
    return "" if value is None else f"{value:+.3f}"


def p_value(value: float | None) -> str:
    """Three places, or that it is smaller."""
    return "" if value is None else (f"{value:.3f}" if value >= 0.001 else "< .001")


def thousands(value: Any) -> str:
    """`12,480`; nothing where it is unknown."""
    return f"{value:,}" if isinstance(value, int) else ""


def count(value: Any, word: str) -> str:
    """`1 method`, `12 methods`."""
    if not isinstance(value, int):
        return f"an unknown number of {word}s"
    return f"{value:,} {word}{'' if value == 1 else 's'}"


def unit(results: Mapping[str, Any]) -> str:
    """What is resampled and split by: "patient", or "image" where no patient is known and each image is its own."""
    return "patient" if results.get("data", {}).get("patients") else "image"
