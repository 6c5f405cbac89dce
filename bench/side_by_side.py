"""Studies of one design beside each other, as Markdown: what each measured, and what the reference has more.

    python bench/side_by_side.py runs/topology-simclr runs/topology-byol --against image,longer,views

A value is the mean over the folds of a repeat; with as many repeats as seeds it is of one pretraining. Pairs are of one
study and repeat, so all share their folds: a paired t test over them speaks of pretraining again with these methods, on
these patients, and Holm's correction is over the table. Intervals by patient are in each study's own report.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from kladi.evaluate.record import results
from kladi.evaluate.statistics import holm
from kladi.report.wording import p_value


def values(folder, metric, regime):
    """(method, task) -> mean over the folds of each repeat, in the order of the repeats."""
    found = defaultdict(lambda: defaultdict(list))
    for row in results.read(folder)["rows"]:
        if (row["metric"], row["regime"], row.get("label_fraction", 1.0)) == (metric, regime, 1.0):
            found[row["method"], row["dataset"]][row["repeat"]].append(row["value"])
    return {key: np.array([np.mean(by[repeat]) for repeat in sorted(by)]) for key, by in found.items()}


def detectable(pairs, power=0.8):
    """The effect, in standard deviations of the differences, that a paired t test of .05 finds with that power."""
    threshold = stats.t.ppf(0.975, pairs - 1)
    sizes = np.linspace(0.05, 6 if pairs < 6 else 2, 2000)
    found = stats.nct.sf(threshold, pairs - 1, sizes * pairs**0.5)
    return float(sizes[np.argmax(found >= power)])


def table(head, rows):
    print("\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]), end="\n\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="folders of kladi compare")
    parser.add_argument("--against", default="", help="methods that the reference is compared with; all where nothing")
    parser.add_argument("--metric", default="balanced_accuracy")
    parser.add_argument("--regime", default="probe")
    asked = parser.parse_args()
    of = {folder.name: values(folder, asked.metric, asked.regime) for folder in asked.studies}
    said = results.read(asked.studies[0])
    reference, tasks = said["study"]["reference"], said["study"]["tasks"]
    methods = [method["method"] for method in said["methods"]]
    for task in tasks:
        rows = []
        for method in methods:
            each = [of[name][method, task] for name in of]
            shown = [f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in each]
            rows.append([method, *shown, f"{np.mean([v.mean() for v in each]):.3f}"])
        table([task, *of, "mean"], rows)
    compared = [
        (method, task, [of[name][reference, task] - of[name][method, task] for name in of])
        for method in (asked.against.split(",") if asked.against else methods)
        for task in tasks
        if method != reference
    ]
    pairs = [np.concatenate(differences) for *_, differences in compared]
    tests = [stats.ttest_1samp(d, 0) for d in pairs]
    rows = []
    for (method, task, differences), d, test, corrected in zip(
        compared, pairs, tests, holm(np.array([t.pvalue for t in tests])), strict=True
    ):
        low, high = test.confidence_interval()
        each = [f"{one.mean():+.3f}" for one in differences]
        interval = f"[{low:+.3f}, {high:+.3f}]"
        rows.append([method, task, *each, f"{d.mean():+.3f}", interval, p_value(test.pvalue), p_value(corrected)])
    table([f"{reference} less", "task", *of, "mean", "95 % over pairs", "p", "p, Holm"], rows)
    print(f"{len(pairs[0])} pairs: 80 % power takes a difference of {detectable(len(pairs[0])):.2f} of its deviations")


if __name__ == "__main__":
    main()
