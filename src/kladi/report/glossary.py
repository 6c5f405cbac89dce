"""What the metrics of a page mean, for a reader who meets them first there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kladi.report.tables import words

GLOSSARY = {
    "balanced_accuracy": "mean over the classes of the share answered right; chance is 1 / classes",
    "macro_f1": "F1 of each class, averaged over the classes",
    "auc": "area under the ROC curve, one class against the rest, averaged",
    "hierarchical_f1": "F1 between the sets of ancestors of answer and truth, so that a near miss counts in part",
    "hierarchical_f1_macro": "the same within each true class, averaged over the classes",
    "tree_accuracy": "1 - distance in the tree between answer and truth over the largest there is, averaged",
    "mistake_severity": "among the errors, mean height of the lowest common ancestor of answer and truth",
    "parent_violation_rate": "share nearer to another prototype of their parent's depth than to their parent's",
    "calibration_error": "mean distance of the stated probability from the share of right answers; 0 is honest",
    "hierarchical_distance_at_1": "mean of that height over all images, right ones counting 0; at 5, of 5 classes",
    "least_cost_distance": "the same for the answer of least expected height instead of the likeliest class",
    "tree_distance_at_1": "tree distance to the nearest training image over the largest there is; at 5, mean of the 5",
    "recall_at_1": "share of test images whose nearest training image has their class; at 5, one of the 5 nearest",
    "mean_average_precision": "how far up a query's own class stands in the whole ranking",
    "effective_rank": "exp of the entropy of the singular values: how many directions are used",
    "std_mean": "spread of the directions over the dimensions; 1 is even, 0 a collapse",
    "std_min": "the least spread of a dimension",
    "dead_share": "share of dimensions that are constant",
    "uniformity": "log mean Gaussian potential of pairs on the sphere; lower is more even",
    "zero_rows": "images whose embedding is zero",
}


def of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics of this page that need a word."""
    there = {row["metric"] for row in results.get("rows", [])}
    return [(words(metric), meaning) for metric, meaning in GLOSSARY.items() if metric in there]
