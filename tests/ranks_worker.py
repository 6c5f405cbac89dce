"""One of two processes: the loss and the gradient of each objective over a batch of which it holds a half."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import tiny
from kladi.data.modalities import Modality
from kladi.data.views.batch import View
from kladi.data.views.loader import Loader
from kladi.learn import presets, ranks
from kladi.learn.facts import Facts
from kladi.models.heads import Projector

CASES = {
    "simclr": {},
    "supcon": {"views": 0.3},
    "cross_entropy": {},
    "tree_cross_entropy": {"label_smoothing": 0.1},
    "hxe": {},
    "metadata": {"instance": 0.4},
    "himulcon": {},
    "label_tree": {"views": 0.2},
    "label_tree poincare": {"geometry": "poincare", "learn_curvature": True},
    "moco_v3": {},
    "byol": {},
    "dino": {"prototypes": 5},
    "barlow_twins": {},
    "multimodal": {"ranks": 2},
}


class Flat(nn.Module):
    """An encoder without batch statistics, which processes do not share on a CPU."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16 * 16, 12)

    def forward(self, image):
        return torch.tanh(self.layer(image.flatten(1)))


def with_tables(dataset, seed=0):
    """Beside the images a table of every second patient, and one of two rows in three."""
    rng = np.random.default_rng(seed)
    some = (dataset.group % 2 == 0, np.arange(len(dataset)) % 3 > 0)
    values = [
        rng.normal(size=(len(dataset), d)).astype(np.float32) * there[:, None]
        for d, there in zip((3, 5), some, strict=True)
    ]
    made = [
        Modality(name, tuple(f"{name} {i}" for i in range(x.shape[1])), x, there)
        for name, x, there in zip(("clinic", "labs"), values, some, strict=True)
    ]
    return dataclasses.replace(dataset, modalities=tuple(made))


def exact(batch):
    """In float64."""
    views = tuple(View(view.image.double()) for view in batch.views)
    return dataclasses.replace(batch, views=views, tables=tuple(table.double() for table in batch.tables))


def measured(name, rank, world):
    """{quantity: tensor} of one step; a batch of which some rows have no label."""
    dataset = with_tables(tiny.data(labelled=0.7))
    torch.manual_seed(0)
    encoder, projector = Flat(), Projector(12, 8, 6)
    known = Facts.of(dataset)
    objective = presets.build(name.split()[0], CASES[name], known, encoder, projector)
    config = tiny.settings(train__batch=9)  # 5 rows for one process, 4 for the other
    loader = Loader(dataset, config, 2, torch.device("cpu"), rank=rank, world=world)
    batch = next(loader.epoch(0))
    terms = objective.double()(exact(batch))
    objective.total(terms).backward()
    ranks.mean_gradients(objective.parameters())
    found = {f"loss {key}": term.detach() for key, term in terms.items()}
    found |= {f"idle {key}": torch.tensor(share) for key, share in objective.idle.items()}
    found |= {f"gradient {key}": p.grad for key, p in objective.named_parameters() if p.grad is not None}
    return found | {f"buffer {key}": b.float() for key, b in objective.named_buffers() if "num_batches" not in key}


if __name__ == "__main__":
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for number, name in enumerate(CASES):
        found = {key: value.contiguous().clone() for key, value in measured(name, rank, world).items()}
        save_file(found, folder / f"{number}-{rank}.safetensors")
    flags = ranks.agreed(rank == 1, False, device=torch.device("cpu"))
    assert flags == (True, False)
    assert ranks.rows_of_all(torch.tensor([rank == 0, True])).tolist() == [True, True, False, True]
    assert ranks.rows_of_all(torch.full((1 + rank, 2), rank)).tolist() == [[0, 0], [1, 1], [1, 1]]
    dist.destroy_process_group()
