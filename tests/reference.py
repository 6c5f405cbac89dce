"""Each formula once more, as the sheets word it: loops over samples and nodes, no shared code with `kladi`.

A tree is a mapping `parents: {node: [parent, ...]}` over any hashable names; a top node has no parent. Loss references
work on float64 tensors entry by entry, so that autograd gives a reference gradient too.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

Node = Hashable
Parents = Mapping[Node, Sequence[Node]]


# --- trees ---------------------------------------------------------------------------------------------------------


def parents_from_paths(paths: Sequence[str]) -> dict[str, list[str]]:
    """`a/b/c` names the nodes `a`, `a/b`, `a/b/c`."""
    parents: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split("/")
        for level in range(len(parts)):
            parents["/".join(parts[: level + 1])] = ["/".join(parts[:level])] if level else []
    return parents


def ancestors(parents: Parents, node: Node | None) -> set[Node]:
    """The node and everything above it; the empty set for the answer "root", which is None."""
    if node is None:
        return set()
    found = {node}
    for parent in parents[node]:
        found |= ancestors(parents, parent)
    return found


def children(parents: Parents, node: Node | None) -> list[Node]:
    return [n for n, above in parents.items() if (node in above if node is not None else not above)]


def height(parents: Parents, node: Node | None) -> int:
    """Longest way down to a leaf, in edges; None is the implicit root, which is no level of its own."""
    below = children(parents, node)
    if node is None:
        return max(len(ancestors(parents, n)) for n in parents)
    return 1 + max(height(parents, n) for n in below) if below else 0


def overlap(parents: Parents, a: Node, b: Node) -> float:
    A, B = ancestors(parents, a), ancestors(parents, b)
    return len(A & B) / max(len(A), len(B))


def edges_between(parents: Parents, a: Node | None, b: Node | None) -> int:
    """Breadth-first search in the undirected graph that has the root as a node."""
    queue, seen = deque([(a, 0)]), {a}
    while queue:
        node, steps = queue.popleft()
        if node == b:
            return steps
        near = list(children(parents, node)) + ([] if node is None else list(parents[node]) or [None])
        for other in near:
            if other not in seen:
                seen.add(other)
                queue.append((other, steps + 1))
    raise AssertionError("not connected")


def lca_height(parents: Parents, a: Node | None, b: Node | None) -> int:
    if a == b:
        return 0
    shared = ancestors(parents, a) & ancestors(parents, b)
    deepest = max(shared, key=lambda n: len(ancestors(parents, n)), default=None)
    return height(parents, deepest)


def leaves(parents: Parents) -> list[Node]:
    return [n for n in parents if not children(parents, n)]


def leaf_diameter(parents: Parents) -> int:
    return max((edges_between(parents, a, b) for a, b in itertools.combinations(leaves(parents), 2)), default=0)


def ancestor_at(parents: Parents, node: Node, depth: int) -> Node | None:
    return next((n for n in ancestors(parents, node) if len(ancestors(parents, n)) == depth), None)


# --- metrics -------------------------------------------------------------------------------------------------------


def hierarchical_prf(parents: Parents, pred: Sequence[Node | None], true: Sequence[Node]) -> tuple[float, float, float]:
    shared = sum(len(ancestors(parents, p) & ancestors(parents, t)) for p, t in zip(pred, true, strict=True))
    size_p = sum(len(ancestors(parents, p)) for p in pred)
    size_t = sum(len(ancestors(parents, t)) for t in true)
    precision = shared / size_p if size_p else 0.0
    recall = shared / size_t if size_t else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if shared else 0.0


def hierarchical_prf_macro(
    parents: Parents, pred: Sequence[Node | None], true: Sequence[Node]
) -> tuple[float, float, float]:
    groups = [
        hierarchical_prf(parents, [p for p, t in zip(pred, true, strict=True) if t == node], [node] * true.count(node))
        for node in set(true)
    ]
    return tuple(sum(column) / len(groups) for column in zip(*groups, strict=True))


def mistake_severity(parents: Parents, pred: Sequence[Node | None], true: Sequence[Node]) -> float:
    wrong = [lca_height(parents, p, t) for p, t in zip(pred, true, strict=True) if p != t]
    return sum(wrong) / len(wrong) if wrong else math.nan


def tree_accuracy(parents: Parents, pred: Sequence[Node | None], true: Sequence[Node]) -> float:
    D = leaf_diameter(parents)
    scores = [
        max(0.0, 1 - edges_between(parents, p, t) / D) if D else float(p == t) for p, t in zip(pred, true, strict=True)
    ]
    return sum(scores) / len(scores)


def level_accuracy(parents: Parents, pred: Sequence[Node | None], true: Sequence[Node]) -> list[float]:
    result = []
    for depth in range(1, height(parents, None) + 1):
        rows = [(p, t) for p, t in zip(pred, true, strict=True) if len(ancestors(parents, t)) >= depth]
        right = [ancestor_at(parents, t, depth) in ancestors(parents, p) for p, t in rows]
        result.append(sum(right) / len(right) if right else math.nan)
    return result


def violations(
    parents: Parents,
    points: Tensor,
    true: Sequence[Node],
    prototypes: Mapping[Node, Tensor],
    level: Callable[[Node], int],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> list[bool | None]:
    """One entry a row: is some other node of depth `level(true)` strictly nearer than the row's own? None: left out."""
    result: list[bool | None] = []
    for x, t in zip(points, true, strict=True):
        depth = level(t)
        own = ancestor_at(parents, t, depth) if depth >= 1 else None
        rivals = [v for v in prototypes if len(ancestors(parents, v)) == depth and v != own]
        if own not in prototypes or not rivals:
            result.append(None)
        else:
            result.append(bool(min(distance(x, prototypes[v]) for v in rivals) < distance(x, prototypes[own])))
    return result


def recall_at_k(z: Tensor, true: Sequence[int], k: int, groups: Sequence[Hashable] | None = None) -> float:
    """Cosine, self excluded; among equally similar rows the ones with another label come first."""
    hits = []
    for i in range(len(true)):
        gallery = [j for j in range(len(true)) if j != i and (groups is None or groups[j] != groups[i])]
        if not any(true[j] == true[i] for j in gallery):
            continue
        cosine = {j: float(torch.cosine_similarity(z[i], z[j], dim=0)) for j in gallery}
        gallery.sort(key=lambda j: (-round(cosine[j], 9), true[j] == true[i]))
        hits.append(any(true[j] == true[i] for j in gallery[:k]))
    return sum(hits) / len(hits) if hits else math.nan


# --- geometry ------------------------------------------------------------------------------------------------------


def embed(z: Tensor, geometry: str, c: float = 0.1, clip: float = 2.3) -> Tensor:
    norm = math.sqrt(sum(v**2 for v in z.tolist()))
    if norm == 0:
        return z * 0
    if geometry == "sphere":
        return z / (z * z).sum().sqrt()
    v = z * (clip / (z * z).sum().sqrt()) if norm > clip else z
    length = (v * v).sum().sqrt()
    return torch.tanh(math.sqrt(c) * length) * v / (math.sqrt(c) * length)


def distance(x: Tensor, y: Tensor, geometry: str, c: float = 0.1) -> Tensor:
    square = ((x - y) ** 2).sum()
    if square.item() == 0:
        return square
    if geometry == "sphere":
        return square.sqrt()
    return torch.acosh(1 + 2 * c * square / ((1 - c * (x * x).sum()) * (1 - c * (y * y).sum()))) / math.sqrt(c)


def similarity(x: Tensor, y: Tensor, geometry: str, c: float = 0.1) -> Tensor:
    return (x * y).sum() if geometry == "sphere" else -distance(x, y, geometry, c)


def mobius_add(x: Tensor, y: Tensor, c: float) -> Tensor:
    xy, xx, yy = (x * y).sum(), (x * x).sum(), (y * y).sum()
    return ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c * c * xx * yy)


def mean(points: Sequence[Tensor], geometry: str, c: float = 0.1) -> Tensor:
    if geometry == "sphere":
        total = sum(points)
        return total / (total * total).sum().sqrt()
    # Einstein midpoint by way of the Klein model, where it is a plain weighted mean.
    klein = [2 * x / (1 + c * (x * x).sum()) for x in points]
    lorentz = [1 / (1 - c * (k * k).sum()).sqrt() for k in klein]
    k = sum(g * k for g, k in zip(lorentz, klein, strict=True)) / sum(lorentz)
    return k / (1 + (1 - c * (k * k).sum()).sqrt())


def step(start: Tensor, end: Tensor, t: float, geometry: str, c: float = 0.1) -> Tensor:
    if geometry == "sphere":
        mixed = (1 - t) * start + t * end
        return mixed / (mixed * mixed).sum().sqrt()
    way = mobius_add(-start, end, c)
    length = (way * way).sum().sqrt()
    if length.item() == 0:
        return start
    root = math.sqrt(c)
    return mobius_add(start, torch.tanh(t * torch.atanh(root * length)) * way / (root * length), c)


# --- contrast ------------------------------------------------------------------------------------------------------


def soft_contrast(logit: Callable[[int, int], Tensor], weight: Callable[[int, int], float], n: int) -> Tensor:
    """Mean over rows i with a positive of `- sum_j q_ij log p_ij`, p over all k != i, q_ij = W_ij / sum_m W_im."""
    losses = []
    for i in range(n):
        others = [k for k in range(n) if k != i]
        total = sum(weight(i, k) for k in others)
        if total == 0:
            continue
        logits = torch.stack([logit(i, k) for k in others])
        log_p = logits - torch.logsumexp(logits, 0)
        losses.append(-sum(weight(i, k) / total * log_p[a] for a, k in enumerate(others)))
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def supcon(z: Tensor, target: Sequence[int], temperature: float) -> Tensor:
    V, B = z.shape[:2]
    x = [embed(row, "sphere") for row in z.flatten(0, 1)]
    y = [target[i % B] for i in range(V * B)]
    return soft_contrast(lambda i, k: (x[i] * x[k]).sum() / temperature, lambda i, k: float(y[i] == y[k]), V * B)


def hierarchy_weighted_contrast(
    z: Tensor,
    target: Sequence[Node],
    parents: Parents,
    *,
    temperature: float = 0.1,
    alpha: float = 0.5,
    beta: float = 0.5,
    mode: str = "scale",
    positives: str = "leaf",
    geometry: str = "sphere",
    curvature: float = 0.1,
    clip: float = 2.3,
) -> Tensor:
    V, B = z.shape[:2]
    x = [embed(row, geometry, curvature, clip) for row in z.flatten(0, 1)]
    kin = {(a, b): overlap(parents, a, b) for a in set(target) for b in set(target)}

    def r(i: int, k: int) -> float:
        return kin[target[i % B], target[k % B]]

    def weight(i: int, k: int) -> float:
        return {"leaf": float(target[i % B] == target[k % B]), "graded": r(i, k), "view": float(i % B == k % B)}[
            positives
        ]

    def logit(i: int, k: int) -> Tensor:
        s = similarity(x[i], x[k], geometry, curvature)
        if mode == "mass":
            return s / temperature + (-math.log(1 + alpha) if weight(i, k) > 0 else math.log(1 - beta * r(i, k)))
        if weight(i, k) > 0:
            return (1 + alpha) * s / temperature
        softened = 1 - beta * r(i, k)
        return (s * softened if geometry == "sphere" else s / softened) / temperature

    return soft_contrast(logit, weight, V * B)


# --- prototypes ----------------------------------------------------------------------------------------------------


class LevelAwareMargin:
    """The prototype loss with its state as two dictionaries: node -> point, node -> number of updates."""

    def __init__(
        self, parents: Parents, *, margin=0.3, decay=0.7, pull=0.1, momentum=0.95, geometry="sphere", c=0.1, clip=2.3
    ) -> None:
        self.parents, self.margin, self.decay, self.pull, self.momentum = parents, margin, decay, pull, momentum
        self.geometry, self.c, self.clip = geometry, c, clip
        self.level_weight: Callable[[int], float] = lambda depth: 1.0
        self.point: dict[Node, Tensor] = {}
        self.seen: dict[Node, int] = {}

    def __call__(self, z: Tensor, target: Sequence[Node], training: bool = True) -> Tensor:
        B = z.shape[1]
        rows = [embed(row, self.geometry, self.c, self.clip) for row in z.flatten(0, 1)]
        labels = [target[i % B] for i in range(len(rows))]
        top, bottom = torch.zeros((), dtype=z.dtype), 0.0
        for x, y in zip(rows, labels, strict=True):
            for own in ancestors(self.parents, y):
                depth = len(ancestors(self.parents, own))
                rivals = [v for v in self.point if len(ancestors(self.parents, v)) == depth and v != own]
                if own not in self.point or not rivals:
                    continue
                margin = self.margin * self.decay ** (depth - 1)
                near = self.distance(x, self.point[own])
                far = min(self.distance(x, self.point[v]) for v in rivals)
                hinge = torch.clamp(near - far + margin, min=0)
                top = top + self.level_weight(depth) * (hinge + self.pull * near**2)
                bottom += self.level_weight(depth)
        if training:
            self.update([row.detach() for row in rows], labels)
        return top / bottom if bottom else top

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        d = distance(x, y, self.geometry, self.c)
        return d if self.geometry == "sphere" else d / (2 * self.clip)

    def update(self, rows: Sequence[Tensor], labels: Sequence[Node]) -> None:
        for node in self.parents:
            below = [x for x, y in zip(rows, labels, strict=True) if node in ancestors(self.parents, y)]
            if not below:
                continue
            if self.geometry == "sphere" and float((sum(below) / len(below)).norm()) < 1e-6:
                continue
            count = self.seen.get(node, 0) + 1
            rho = min(self.momentum, 1 - 1 / count)
            centre = mean(below, self.geometry, self.c)
            self.seen[node] = count
            self.point[node] = centre if count == 1 else step(self.point[node], centre, 1 - rho, self.geometry, self.c)
