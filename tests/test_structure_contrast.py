"""The contrast by its definition over pairs of patients, its limits, missing modalities, gradients."""

import numpy as np
import pytest
import torch

from kladi.losses.factor import StructureContrastLoss, blocks
from kladi.models.factors import fitting
from kladi.models.factors.covariance import Dense
from kladi.models.factors.encoder import FactorEncoder
from kladi.structure.lattice import Lattice

LATTICE = Lattice.of(3, {"0+1+2": 2, "0+1": 1, "1+2": 2, "0": 1, "2": 3})


def said(n=7, seed=0, lattice=LATTICE):
    generator = torch.Generator().manual_seed(seed)
    widths = [int(lattice.of_modality(m).sum()) for m in range(lattice.modalities)]
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) + 1 for width in widths]


def naive(lattice, h, again=None):
    """Sums over patients and pairs of patients, as the definition has them; `again`, of a second look."""
    second = h if again is None else again
    n, phi = len(h[0]), np.zeros((len(h[0]), len(h[0])))
    for structure in lattice.structures:
        for m in structure:
            for k in structure:
                a, b = h[m][:, blocks(lattice, m)[structure]], second[k][:, blocks(lattice, k)[structure]]
                for i in range(n):
                    for j in range(n):
                        phi[i, j] += float(a[i] @ b[j])
    off = phi.sum() - np.trace(phi)
    contrast = -np.trace(phi) / (2 * n) + off / (2 * n * (n - 1))
    penalty = sum(np.square(np.cov(part.numpy().T)).sum() for part in (*h, *second)) / 8
    return contrast, penalty


def test_it_is_its_definition():
    h = said()
    contrast, penalty = naive(LATTICE, h)
    for weight in (1.0, 0.3):
        found = StructureContrastLoss(LATTICE, weight=weight)(h)
        assert float(found) == pytest.approx(contrast + weight * penalty, rel=1e-12)


def test_a_second_look_is_in_its_definition():
    h, again = said(seed=0), said(seed=1)
    contrast, penalty = naive(LATTICE, h, again)
    loss = StructureContrastLoss(LATTICE, weight=0.3)
    assert float(loss(h, again=again)) == pytest.approx(contrast + 0.3 * penalty, rel=1e-12)
    assert float(loss(again, again=h)) == pytest.approx(float(loss(h, again=again)), rel=1e-12)
    assert float(loss(h, again=h)) == pytest.approx(float(loss(h)), rel=1e-12)
    with pytest.raises(ValueError, match="modalities say"):
        loss(h, again=again[:2])


def test_two_looks_at_one_modality_are_the_spectral_contrast():
    """Of centred rows: half of -E<h, h'> + 1/2 E<h_i, h_j>^2, the last over all pairs of each look."""
    lattice = Lattice.of(1, 3)
    (h,), (again,) = said(40, 0, lattice), said(40, 1, lattice)
    one, two = h - h.mean(0), again - again.mean(0)
    repelled = ((one @ one.T).square().sum() + (two @ two.T).square().sum()) / (2 * 39**2)
    want = 0.5 * (-(one * two).sum() / 39 + 0.5 * repelled)
    torch.testing.assert_close(StructureContrastLoss(lattice)([h], again=[again]), want)


def test_a_second_look_has_gradients_and_opposed_looks_cost_most():
    lattice = Lattice.of(2, {"0+1": 1, "0": 2})
    h, again = ([part.requires_grad_() for part in said(6, seed, lattice)] for seed in (0, 1))
    loss = StructureContrastLoss(lattice)
    assert torch.autograd.gradcheck(lambda *x: loss(list(x[:2]), again=list(x[2:])), (*h, *again))
    plain = [part.detach() for part in h]
    assert loss(plain, again=[-part for part in plain]) > loss(plain)


def test_one_modality_is_whitened():
    lattice = Lattice.of(1, 3)
    (h,) = said(20, lattice=lattice)
    covariance = torch.cov(h.T)
    want = 0.25 * (covariance - torch.eye(3)).square().sum() - 3 / 4
    torch.testing.assert_close(StructureContrastLoss(lattice)([h]), want)


def test_linear_encoders_at_the_factor_models_weights_have_no_slope():
    """With the penalty on weights in its place, the contrast is at rest in the factor model of these patients."""
    rng = np.random.default_rng(0)
    lattice, sizes, noise = Lattice.of(2, 1), (4, 5), 0.3
    true = rng.normal(size=(9, 3)) * fitting.mask(sizes, lattice)
    raw = rng.normal(size=(300, 9))
    raw = (raw - raw.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T)).T)
    x = raw @ np.linalg.cholesky(true @ true.T + noise * np.eye(9)).T  # whose covariance is exactly that
    w = torch.tensor(fitting.fit(Dense(np.cov(x.T), sizes), lattice).weights).requires_grad_()
    free = torch.tensor(fitting.mask(sizes, lattice))
    parts = [torch.tensor(x[:, :4]) @ w[:4], torch.tensor(x[:, 4:]) @ w[4:]]
    h = [part[:, torch.tensor(lattice.of_modality(m))] for m, part in enumerate(parts)]
    bare = StructureContrastLoss(lattice, weight=1e-12)(h)  # next to no penalty
    loss = bare + 0.25 * (w.T @ w).square().sum() + 0.5 * noise * (w * w).sum()
    (slope,) = torch.autograd.grad(loss, w)
    assert float(slope[free].abs().max()) < 1e-4 * float(w.detach().abs().max())


def test_patients_may_be_in_any_order_and_missing_ones_are_not_read():
    h, present = said(9), torch.ones(9, 3, dtype=torch.bool)
    present[0, 0] = present[1, 1] = present[2, 0] = present[2, 2] = False
    loss = StructureContrastLoss(LATTICE)
    want = loss(h, present)
    assert loss.pairs.tolist() == [[7, 6, 7], [6, 8, 7], [7, 7, 8]]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss([part[order] for part in h], present[order]), want)
    holes = [part.clone() for part in h]
    for m in range(3):
        holes[m][~present[:, m]] = float("nan")
        holes[m].requires_grad_()
    found = loss(holes, present)
    torch.testing.assert_close(found, want)
    for m, gradient in enumerate(torch.autograd.grad(found, holes)):
        assert (gradient[~present[:, m]] == 0).all()


def test_gradcheck_and_precision():
    h = [part.requires_grad_() for part in said(6)]
    loss = StructureContrastLoss(LATTICE)
    assert torch.autograd.gradcheck(lambda *parts: loss(list(parts)), h)
    single = loss([part.detach().float() for part in h])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), loss(h), rtol=1e-5, atol=1e-5)


def test_nobody_together_is_a_zero_that_keeps_its_graph():
    h = [part.requires_grad_() for part in said(3)]
    loss = StructureContrastLoss(LATTICE)(h, torch.eye(3, dtype=torch.bool))
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, h))


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match=r"weight must be a positive number, not 0.0"):
        StructureContrastLoss(LATTICE, weight=0.0)
    h = said()
    with pytest.raises(ValueError, match=r"modalities say \[4, 5, 6\] factors; the lattice has \[4, 5, 7\]"):
        StructureContrastLoss(LATTICE)([h[0], h[1], h[2][:, :6]])


def test_each_modality_has_a_network_for_each_structure():
    encoder = FactorEncoder((4, 3, 5), LATTICE, hidden=((8,),) * 3)
    features = [torch.randn(6, size) for size in (4, 3, 5)]
    h = encoder(features)
    assert [part.shape[1] for part in h] == [4, 5, 7]
    assert len(encoder.networks) == 9
    loss = StructureContrastLoss(LATTICE)(h)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    with pytest.raises(ValueError, match="2 modalities have sizes; the lattice has 3"):
        FactorEncoder((4, 3), LATTICE)


def test_factors_are_means_of_what_is_there():
    encoder = FactorEncoder((4, 3, 5), LATTICE, hidden=((),) * 3)
    features = [torch.randn(4, size) for size in (4, 3, 5)]
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [True, False, False]])
    h, z = encoder(features), encoder.factors(features, present)
    assert z.shape == (4, LATTICE.width)
    first = [part[:, blocks(LATTICE, m)[0, 1, 2]] for m, part in enumerate(h)]
    torch.testing.assert_close(z[0, :2], (first[0][0] + first[1][0] + first[2][0]) / 3)
    torch.testing.assert_close(z[1, :2], (first[0][1] + first[2][1]) / 2)
    torch.testing.assert_close(z[2, :2], first[2][2])
    columns = dict(LATTICE.columns())
    assert (z[3, columns[1, 2]] == 0).all()
    assert (z[2, columns[0,]] == 0).all()
    torch.testing.assert_close(encoder.factors(features)[0], z[0])


def test_training_finds_what_two_modalities_share():
    """From curved measurements of the same factor, without a label."""
    generator = torch.Generator().manual_seed(0)
    lattice = Lattice.of(2, {"0+1": 1, "0": 1, "1": 1})
    z = torch.randn(512, 3, generator=generator)
    x0 = torch.stack([z[:, 0] + z[:, 1], torch.tanh(z[:, 1]) - z[:, 0], z[:, 1] ** 3 / 5], dim=1)
    x1 = torch.stack([z[:, 0] - z[:, 2], z[:, 2] + 0.5 * torch.tanh(z[:, 0]), z[:, 0] * 2], dim=1)
    torch.manual_seed(0)
    encoder, loss = FactorEncoder((3, 3), lattice, hidden=((32,),) * 2), StructureContrastLoss(lattice)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(encoder([x0, x1])).backward()
        optimizer.step()
    found = encoder.factors([x0, x1])[:, 0]
    assert abs(torch.corrcoef(torch.stack([found, z[:, 0]]))[0, 1].item()) > 0.9
