"""The smallest run that has everything: batch normalisation, dropout, moments, prototypes; about 20 ms a step."""

from kladi import config, toy

NAME = "test_efficientnet"
"""99,000 parameters: the smallest of timm's models with batch normalisation."""


def settings(**changes):
    """A configuration of 3 steps an epoch over `data()`; keys are written as in train__epochs=1."""
    values = {
        "intensity.size": 16,
        "encoder.name": NAME,
        "encoder.args": {"drop_rate": 0.2},
        "encoder.projector": (16, 8),
        "objective.name": "label_tree",
        "augment.crop": (0.6, 1.0),
        "train.batch": 8,
        "train.epochs": 2,
        "train.lr": 0.003,
        "train.workers": 0,
        "train.device": "cpu",
    }
    return config.override(config.Config(), {**values, **{k.replace("__", "."): v for k, v in changes.items()}})


def data(**changes):
    """38 pictures, 26 of them for training."""
    return toy.dataset(**{"n": 38, "size": 16, "seed": 0, **changes})
