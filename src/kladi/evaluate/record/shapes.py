"""What an encoder with topology saw: how much it leans on each expert, and which points of a diagram it looks at.

Of the images of the map. Pictures stay in thumbnails.json; here is only which of them belongs to a diagram.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from kladi.data.dataset import TRAIN, Dataset
from kladi.data.embeddings import Embeddings
from kladi.data.views import whole
from kladi.evaluate.record.atlas import parted_names
from kladi.models.fused import DiagramAlone, Fused, file_masks
from kladi.models.topology import EXPERTS

EXAMPLES = 6
MOST_ATTENDED = 0.1
"""Share of a diagram's points that count as most attended."""
BATCH = 256


def of(
    encoder: object, dataset: Dataset, own: Embeddings, rows: Int[np.ndarray, " n"], visible: Bool[np.ndarray, " n"]
) -> dict[str, Any]:
    """experts: mean gate of all images, and of each label of the first level that parts them, with their number.
    persistence: median of the most attended points and of all. images: a few diagrams (birth, death, share of
    attention) with the place of their thumbnail. sight: what the encoder was given, in words; that alone where it was
    no diagram of its own, and nothing for an encoder that sees none.

    Args:
        own: of the data set, for its labels.
        rows: of the data set, those of the map.
        visible: which of them have a thumbnail.
    """
    if not isinstance(encoder, Fused):
        return {}
    if encoder.sight.given != "own" or not len(rows):
        return {"sight": str(encoder.sight)}
    gates, points, masks, shares = (np.concatenate(part) for part in zip(*_looked(encoder, dataset, rows), strict=True))
    names = np.array(parted_names(own, rows))
    found: dict[str, Any] = {
        "sight": str(encoder.sight),
        "persistence": _persistence(points, masks, shares),
        "images": _examples(points, masks, shares, encoder.sight.tokens[0], own, rows, visible),
    }
    if not isinstance(encoder, DiagramAlone):
        groups = {
            "all": np.ones(len(rows), dtype=bool),
            **{str(name): names == name for name in np.unique(names) if name},
        }
        found["experts"] = {
            "names": list(EXPERTS),
            "groups": {name: gates[some].mean(axis=0).round(4).tolist() for name, some in groups.items()},
            "n": {name: int(some.sum()) for name, some in groups.items()},
        }
    return found


@torch.inference_mode()
def _looked(encoder: Fused, dataset: Dataset, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Gates, points, masks and attention, a batch an entry."""
    place = next(encoder.parameters()).device
    encoder.eval()
    out = []
    for start in range(0, len(rows), BATCH):
        index = rows[start : start + BATCH]
        image = whole.images(dataset, index, encoder.intensity, place)
        points, mask = encoder.tokens(image, file_masks(encoder, dataset, index, image))
        encoder(image, points, mask)
        gate = encoder.mixture.gate
        gates = torch.zeros(len(index), len(EXPERTS)) if gate is None else gate
        attended = encoder.topology.attended(points, mask)
        out.append(tuple(x.cpu().numpy() for x in (gates, points, mask, attended)))
    return out


def _persistence(
    points: Float[np.ndarray, "n k 2"], mask: Bool[np.ndarray, "n k"], share: Float[np.ndarray, "n k"]
) -> dict[str, Any] | None:
    """Medians over points; None where no image has one."""
    kept: list[np.ndarray] = []
    for one, inside in zip(share, mask, strict=True):
        most = np.flatnonzero(inside)[np.argsort(-one[inside], kind="stable")]
        kept.append(most[: max(1, round(MOST_ATTENDED * len(most)))])
    if not mask.any():
        return None
    length = points[..., 1] - points[..., 0]
    attended = np.concatenate([one[most] for one, most in zip(length, kept, strict=True)])
    return {
        "attended": round(float(np.median(attended)), 4),
        "all": round(float(np.median(length[mask])), 4),
        "points": int(mask.sum()),
        "n": len(mask),
    }


def _examples(
    points: np.ndarray,
    mask: np.ndarray,
    share: np.ndarray,
    k0: int,
    own: Embeddings,
    rows: np.ndarray,
    visible: np.ndarray,
) -> list[dict[str, Any]]:
    """Images that training has not seen, of as many labels as there are."""
    place = np.where(visible, np.cumsum(visible) - 1, -1)
    order = np.argsort((own.split[rows] == TRAIN).astype(int) + 2 * ~visible, kind="stable")
    labels = own.target[rows]
    first = [order[np.flatnonzero(labels[order] == label)[0]] for label in dict.fromkeys(labels[order].tolist())]
    chosen = list(dict.fromkeys([*first, *order.tolist()]))[:EXAMPLES]
    names = own.taxonomy.names if own.taxonomy is not None else ()
    found = []
    for i in chosen:
        said = np.concatenate([points[i], share[i][:, None]], axis=1).astype(np.float64).round(4)
        found.append(
            {
                "label": names[labels[i]] if labels[i] >= 0 else "",
                "thumbnail": int(place[i]) if visible[i] else None,
                "h0": said[:k0][mask[i][:k0]].tolist(),
                "h1": said[k0:][mask[i][k0:]].tolist(),
            }
        )
    return found
