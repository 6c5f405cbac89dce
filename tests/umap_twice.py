"""A map of three clusters by UMAP, drawn twice; prints whether it repeats and keeps them together."""

import dataclasses
import json

import numpy as np

from kladi import toy
from kladi.evaluate.embed import describe
from kladi.evaluate.readouts.neighbours import purity
from kladi.evaluate.record import atlas

ROWS = 45


def main() -> None:
    rng = np.random.default_rng(0)
    cluster = np.arange(ROWS) % 3
    features = np.eye(3)[cluster].repeat(4, axis=1) * 3 + rng.normal(size=(ROWS, 12)) * 0.3
    made = describe(toy.dataset(n=ROWS, size=16), features.astype(np.float32))
    embeddings = dataclasses.replace(made, columns={"site": ("a", "b", "c") * (ROWS // 3)})
    first, second = atlas.draw(embeddings, kind="umap"), atlas.draw(embeddings, kind="umap")
    together = float(purity(first.points, first.rows % 3, k=10)) > 0.95
    print(
        json.dumps({"kind": first.kind, "repeats": np.array_equal(first.points, second.points), "together": together})
    )


if __name__ == "__main__":
    main()
