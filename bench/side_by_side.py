"""Studies of one design beside each other, as Markdown: what each measured, and what the reference has more.

    python bench/side_by_side.py runs/topology-simclr runs/topology-byol --against image,longer,views

A value is the mean over the folds of a repeat; with as many repeats as seeds it is of one pretraining; `--values` keeps
them all. A further task is the mean of all tasks. Pairs are of one study and repeat, so all share their folds: a paired
t test over them speaks of pretraining again with these methods, on these patients, and Holm's correction is over the
table. The interval over the means of the studies speaks of another method. Intervals by patient are in each study's
own report.
"""

import argparse
import csv
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from kladi.evaluate.record import results
from kladi.evaluate.statistics import holm
from kladi.report.wording import p_value

ALL = "all tasks"


def values(folder, metric, regime):
    """(method, task) -> mean over the folds of each repeat, in the order of the repeats; a task more is their mean."""
    found = defaultdict(lambda: defaultdict(list))
    for row in results.read(folder)["rows"]:
        if (row["metric"], row["regime"], row.get("label_fraction", 1.0)) == (metric, regime, 1.0):
            found[row["method"], row["dataset"]][row["repeat"]].append(row["value"])
    each = {key: np.array([np.mean(by[repeat]) for repeat in sorted(by)]) for key, by in found.items()}
    methods, tasks = ({key[place]: 0 for key in each} for place in (0, 1))
    return each | {(name, ALL): np.mean([each[name, task] for task in tasks], axis=0) for name in methods}


def detectable(pairs, power=0.8):
    """The effect, in standard deviations of the differences, that a paired t test of .05 finds with that power."""
    threshold = stats.t.ppf(0.975, pairs - 1)
    sizes = np.linspace(0.05, 6 if pairs < 6 else 2, 2000)
    found = stats.nct.sf(threshold, pairs - 1, sizes * pairs**0.5)
    return float(sizes[np.argmax(found >= power)])


def keep(file, of):
    """Every value as a row of a CSV."""
    with file.open("w", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["study", "method", "task", "repeat", "value"])
        for name, found in of.items():
            for (method, task), each in found.items():
                if task == ALL:
                    continue
                rows.writerows([name, method, task, repeat, f"{value:.4f}"] for repeat, value in enumerate(each))


def table(head, rows):
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    print("\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]), end="\n\n")


def interval(test):
    low, high = test.confidence_interval()
    return f"[{low:+.3f}, {high:+.3f}]"


def means(of, methods, task):
    """What each study measured of each method."""
    rows = []
    for method in methods:
        each = [found[method, task] for found in of.values()]
        shown = [f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in each]
        rows.append([method, *shown, f"{np.mean([v.mean() for v in each]):.3f}"])
    table([task, *of, "mean"], rows)


def differences(of, reference, others, tasks):
    """What the reference has more than each of the others, over pairs of one study and repeat."""
    asked = list(itertools.product(others, tasks))
    by = [[found[reference, task] - found[other, task] for found in of.values()] for other, task in asked]
    tests = [stats.ttest_1samp(np.concatenate(each), 0) for each in by]
    corrected = holm(np.array([test.pvalue for test in tests]))
    rows = []
    for (other, task), each, test, p in zip(asked, by, tests, corrected, strict=True):
        found = np.array([one.mean() for one in each])
        over = interval(stats.ttest_1samp(found, 0)) if len(found) > 1 else ""
        said = [f"{value:+.3f}" for value in (*found, np.concatenate(each).mean())]
        rows.append([other, task, *said, interval(test), p_value(p), over])
    table([f"{reference} less", "task", *of, "mean", "95 % over pairs", "p, Holm", "95 % over studies"], rows)
    pairs = tests[0].df + 1
    least = f"{detectable(pairs):.2f}"
    print(f"{pairs} pairs: 80 % power takes a difference of {least} of its deviations (one test at 5 %, before Holm).")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="folders of kladi compare")
    parser.add_argument("--against", default="", help="methods that the reference is compared with; all where nothing")
    parser.add_argument("--metric", default="balanced_accuracy")
    parser.add_argument("--regime", default="probe")
    parser.add_argument("--values", type=Path, help="a CSV to write every value to")
    asked = parser.parse_args()
    of = {folder.name: values(folder, asked.metric, asked.regime) for folder in asked.studies}
    if asked.values:
        keep(asked.values, of)
    said = results.read(asked.studies[0])
    reference, tasks = said["study"]["reference"], [*said["study"]["tasks"], ALL]
    methods = [method["method"] for method in said["methods"]]
    others = asked.against.split(",") if asked.against else [name for name in methods if name != reference]
    unknown = [name for name in others if name not in methods]
    if unknown:
        parser.error(f"--against {unknown[0]}: the methods are {', '.join(methods)}")
    for task in tasks:
        means(of, methods, task)
    differences(of, reference, others, tasks)


if __name__ == "__main__":
    main()
