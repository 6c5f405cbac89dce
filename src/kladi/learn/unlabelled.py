"""Presets that read neither label nor metadata, each with the head of its paper at the sizes of `encoder.projector`."""

from __future__ import annotations

from torch import nn

from kladi.learn.facts import Facts
from kladi.learn.objectives import Supervised, Term
from kladi.learn.siamese import Siamese
from kladi.losses import BarlowTwinsLoss, BYOLLoss, DINOLoss, MoCoV3Loss, NTXentLoss
from kladi.models.heads import Projector, Prototypes


def simclr(facts: Facts, encoder: nn.Module, projector: Projector, *, temperature: float = 0.1) -> Supervised:  # noqa: ARG001
    """Views of one image attract each other, all else repels (NT-Xent).

    Source: Chen et al., A simple framework for contrastive learning of visual representations, ICML 2020.
    """
    return Supervised(encoder, projector, {"ntxent": Term(NTXentLoss(temperature=temperature))})


def moco_v3(
    facts: Facts,  # noqa: ARG001
    encoder: nn.Module,
    projector: Projector,
    *,
    temperature: float = 0.2,
    momentum: float = 0.99,
    freeze_patches: bool = True,
) -> Supervised:
    """A prediction finds its own image among a moving copy's embeddings of the other view.

    Source: Chen, Xie, He, An empirical study of training self-supervised vision transformers, ICCV 2021.

    Args:
        temperature: of the loss.
        momentum: of the copy at the first step; it rises to 1. 0.996 from about 20,000 steps on.
        freeze_patches: hold the patch embedding of a vision transformer at its random start, which that paper found
            steadier.
    """
    patches = getattr(getattr(encoder, "model", None), "patch_embed", None)
    if freeze_patches and isinstance(patches, nn.Module):
        patches.requires_grad_(False)
    head = _head(projector, "normed_out")
    predictor = Projector(head.dim, head.hidden, head.dim, "normed_out")
    criterion = MoCoV3Loss(temperature)
    return Siamese(encoder, head, criterion, name="moco_v3", predictor=predictor, momentum=momentum)


def byol(facts: Facts, encoder: nn.Module, projector: Projector, *, momentum: float = 0.99) -> Supervised:  # noqa: ARG001
    """A prediction points where a moving copy's embedding of the other view does; nothing repels.

    Source: Grill et al., Bootstrap your own latent, NeurIPS 2020.

    Args:
        momentum: of the copy at the first step; it rises to 1. 0.996 from about 20,000 steps on.
    """
    head = _head(projector, "normed")
    predictor = Projector(head.dim, head.hidden, head.dim, "normed")
    return Siamese(encoder, head, BYOLLoss(), name="byol", predictor=predictor, momentum=momentum)


def barlow_twins(facts: Facts, encoder: nn.Module, projector: Projector, *, weight: float = 0.005) -> Supervised:  # noqa: ARG001
    """Each dimension agrees between views and is uncorrelated with all others.

    Source: Zbontar et al., Barlow Twins: self-supervised learning via redundancy reduction, ICML 2021.

    Args:
        weight: lambda of the off-diagonal.
    """
    return Siamese(encoder, _head(projector, "deep"), BarlowTwinsLoss(weight), name="barlow_twins")


def dino(
    facts: Facts,  # noqa: ARG001
    encoder: nn.Module,
    projector: Projector,
    *,
    prototypes: int = 1024,
    student: float = 0.1,
    teacher: float = 0.04,
    centre: float = 0.9,
    momentum: float = 0.99,
) -> Supervised:
    """A student's distribution over prototypes follows that of a moving copy, the teacher, on another view.

    Source: Caron et al., Emerging properties in self-supervised vision transformers, ICCV 2021; without local crops.

    Args:
        prototypes: K. 4096 from about 50,000 images on.
        student, teacher, centre: of `DINOLoss`: temperatures, and momentum of the centre.
        momentum: of the copy at the first step; it rises to 1.
    """
    if prototypes < 2:
        raise ValueError(f"prototypes must be 2 or more, not {prototypes}; 1024 is the usual number")
    head = _head(projector, "bottleneck")
    criterion = DINOLoss(prototypes, student, teacher, centre)
    return Siamese(encoder, head, criterion, name="dino", last=Prototypes(head.dim, prototypes), momentum=momentum)


def _head(projector: Projector, form: str) -> Projector:
    """A projector of these sizes in another form."""
    return Projector(projector.width, projector.hidden, projector.dim, form)
