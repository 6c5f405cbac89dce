"""Diagrams against union-find over pixels and the sheet's pictures; distances against every matching."""

import doctest
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import reference_topology as reference
from kladi.errors import UserError
from kladi.structure import bottleneck as matching
from kladi.structure import topology
from kladi.structure.topology import BANDS, Diagram, band, diagram, diagrams, relative_bottleneck

POINT = st.tuples(st.integers(0, 8), st.integers(1, 8)).map(lambda bd: (bd[0] / 16, (bd[0] + bd[1]) / 16))
POINTS = st.lists(POINT, max_size=4)


def points(listed):
    return np.array(listed, dtype=np.float64).reshape(-1, 2)


def disc(centre, radius):
    row, column = np.mgrid[:64, :64]
    return (row - centre[0]) ** 2 + (column - centre[1]) ** 2 <= radius**2


MIDDLE, UPPER, LOWER = (31.5, 31.5), (20, 20), (44, 44)


def painted(ground, *layers):
    """`ground` everywhere, then each (where, value) over what is there."""
    image = np.full((64, 64), float(ground))
    for where, value in layers:
        image[where] = value
    return image


def test_several_images_of_any_sizes_at_once():
    rng = np.random.default_rng(3)
    images = [rng.random(shape) for shape in ((9, 9), (1, 1), (5, 12))]
    found = diagrams(iter(images))
    assert [d.digest for d in found] == [diagram(image).digest for image in images]
    assert diagrams([]) == []


def ring(centre, inner, outer):
    return disc(centre, outer) & ~(disc(centre, inner) & ~on(centre, inner))


def on(centre, radius):
    """Pixels exactly that far: rings include both radii."""
    row, column = np.mgrid[:64, :64]
    return (row - centre[0]) ** 2 + (column - centre[1]) ** 2 == radius**2


def bridge():
    row, column = np.mgrid[:64, :64]
    return (abs(row - column) <= 1) & (row >= 20) & (row <= 44) & ~disc(UPPER, 8) & ~disc(LOWER, 8)


def bump():
    row, column = np.mgrid[:64, :64]
    return np.exp(-((row - 31.5) ** 2 + (column - 31.5) ** 2) / 200)


def few(size, ones):
    image = np.zeros((size, size))
    for at in ones:
        image[at] = 1
    return image


PICTURES = {
    "constant": (painted(0.5), [], []),
    "disc": (painted(0, (disc(MIDDLE, 15), 1)), [], []),
    "ramp": (np.tile(np.linspace(0, 1, 64), (64, 1)), [], []),
    "bump": (bump(), [], []),
    "line across": (painted(0, (np.arange(64)[:, None] + np.zeros((1, 64)) == 30, 1)), [], []),
    "annulus": (painted(0, (ring(MIDDLE, 10, 20), 1)), [], [(0, 1)]),
    "darker inside": (painted(0.1, (disc(MIDDLE, 20), 0.9), (disc(MIDDLE, 9.99), 0.3)), [], [(0.1, 0.7)]),
    "two discs": (painted(0.1, (disc(UPPER, 8), 0.9), (disc(LOWER, 8), 0.7)), [(0.3, 0.9)], []),
    "joined": (painted(0.1, (bridge(), 0.4), (disc(UPPER, 8), 0.9), (disc(LOWER, 8), 0.7)), [(0.3, 0.6)], []),
    "two annuli": (
        painted(0.1, (ring(UPPER, 5, 10), 0.9), (ring(LOWER, 5, 10), 0.7)),
        [(0.3, 0.9)],
        [(0.1, 0.9), (0.3, 0.9)],
    ),
    "rings": (painted(0, (ring(MIDDLE, 24, 28), 0.8), (ring(MIDDLE, 12, 16), 1)), [(0.2, 1)], [(0, 1), (0.2, 1)]),
    "target": (painted(0, (ring(MIDDLE, 24, 28), 0.8), (disc(MIDDLE, 8), 1)), [(0.2, 1)], [(0.2, 1)]),
    "pits": (
        painted(0.9, (disc(UPPER, 6), 0.2), (disc(LOWER, 6), 0.5), (disc((0, 40), 4), 0.1)),
        [],
        [(0.1, 0.5), (0.1, 0.8)],
    ),
    "corner neighbours": (few(5, [(1, 1), (2, 2)]), [], []),
    "diamond": (few(5, [(1, 2), (2, 1), (2, 3), (3, 2)]), [], [(0, 1)]),
    "checkerboard": (np.indices((4, 4)).sum(axis=0) % 2 * 1.0, [], [(0, 1), (0, 1)]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_whose_diagram_is_known(name):
    image, h0, h1 = PICTURES[name]
    found = diagram(image)
    for seen, known in ((found.h0, h0), (found.h1, h1)):
        np.testing.assert_allclose(np.array(sorted(seen.tolist())).reshape(-1, 2), points(sorted(known)), atol=1e-12)


@given(
    arrays.arrays(np.float64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 6)).map(
        lambda image: image / 6
    )
)
def test_it_is_union_find_over_pixels_ties_included(image):
    found = diagram(image)
    assert sorted(map(tuple, found.h0.tolist())) == reference.h0(image.tolist())
    assert sorted(map(tuple, found.h1.tolist())) == reference.h1(image.tolist())


@pytest.mark.parametrize("seed", range(4))
def test_flips_and_turns_change_nothing(seed):
    image = np.random.default_rng(seed).random((17, 23))
    once = diagram(image)
    turned = [np.rot90(part, k) for part in (image, image[:, ::-1]) for k in range(4)]
    for other in turned:
        found = diagram(np.ascontiguousarray(other))
        assert np.array_equal(found.h0, once.h0)
        assert np.array_equal(found.h1, once.h1)
        assert found.digest == once.digest


def test_an_affine_change_of_grey_moves_the_points():
    """v -> a v + c is t -> a t + 1 - a - c."""
    image = np.random.default_rng(0).random((20, 20))
    once, other = diagram(image), diagram(0.5 * image + 0.2)
    np.testing.assert_allclose(other.h0, 0.5 * once.h0 + 0.3, atol=1e-12)
    np.testing.assert_allclose(other.h1, 0.5 * once.h1 + 0.3, atol=1e-12)


def test_points_stand_in_one_order():
    found = diagram(np.random.default_rng(0).integers(0, 5, (16, 16)) / 4)
    for part in (found.h0, found.h1):
        assert len(part) > 5
        assert part.tolist() == sorted(part.tolist(), key=lambda p: (-(p[1] - p[0]), p[0], p[1]))
        assert (part[:, 1] > part[:, 0]).all()
    assert found.span == max(found.h0[0, 1] - found.h0[0, 0], found.h1[0, 1] - found.h1[0, 0])
    assert found.digest != diagram(np.zeros((4, 4))).digest
    assert Diagram(found.h1, found.h0).digest != found.digest


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.full((3, 3), np.nan), "NaN or infinity"),
        (np.array([[0.0, np.inf]]), "NaN or infinity"),
        (np.array([[0.0, 1.5]]), r"values in \[0, 1\]; the image has 0 to 1.5"),
        (np.array([[-0.25, 1.0]]), r"values in \[0, 1\]; the image has -0.25 to 1"),
        (np.zeros((2, 3, 3)), r"of shape \(2, 3, 3\)"),
        (np.zeros((0, 3)), r"of shape \(0, 3\)"),
    ],
)
def test_what_has_no_diagram_is_refused(image, said):
    with pytest.raises(ValueError, match=said):
        diagram(image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 9), (9, 2), (3, 3)])
def test_small_images_have_one(shape):
    image = np.random.default_rng(0).random(shape)
    found = diagram(image)
    assert sorted(map(tuple, found.h0.tolist())) == reference.h0(image.tolist())
    assert sorted(map(tuple, found.h1.tolist())) == reference.h1(image.tolist())
    tokens, mask = diagram(np.full(shape, 0.5)).tokens(2, 3)
    assert not mask.any()
    assert not tokens.any()


def test_tokens_are_the_most_persistent_points_under_a_mask():
    found = diagram(np.random.default_rng(0).random((12, 12)))
    tokens, mask = found.tokens(4, 200)
    count = len(found.h1)
    np.testing.assert_array_equal(tokens[:4], found.h0[:4].astype(np.float32))
    np.testing.assert_array_equal(tokens[4 : 4 + count], found.h1.astype(np.float32))
    assert mask.tolist() == [True] * (4 + count) + [False] * (200 - count)
    assert not tokens[~mask].any()


# --- distances -----------------------------------------------------------------------------------------------------


@given(POINTS, POINTS)
def test_the_distance_is_that_of_the_best_of_all_matchings(a, b):
    known = reference.bottleneck(a, b)
    found = matching.bottleneck(points(a), points(b), 1e-12)
    assert known - 1e-15 <= found <= known + 1e-11
    assert found == matching.bottleneck(points(b), points(a), 1e-12)


@settings(max_examples=50)
@given(POINTS, POINTS, POINTS)
def test_it_is_a_distance(a, b, c):
    def d(x, y):
        return matching.bottleneck(points(x), points(y), 1e-12)

    assert d(a, a) == 0
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-11
    assert d(a, []) == pytest.approx(max((p[1] - p[0] for p in a), default=0) / 2, abs=1e-11)


@given(POINTS, POINTS)
def test_within_is_a_threshold_of_the_distance(a, b):
    known = reference.bottleneck(a, b)  # in sixty-fourths, so the radii beside it are sure
    assert matching.within(points(a), points(b), known)
    for less in np.arange(0, known, 1 / 64):
        assert not matching.within(points(a), points(b), float(less))


def test_crowds_are_matched_by_augmenting_paths():
    """Many points with the same few nearest neighbours: only moving others along a chain finds room for all."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        n = int(rng.integers(12, 40))
        birth = np.round(rng.random(n) * 0.1, 3)
        a = np.stack([birth, np.full(n, 0.9)], axis=1)
        b = a + np.round(rng.normal(size=(n, 2)) * 0.03, 3)
        extra = int(rng.integers(0, 3))
        b = b[: n - extra]
        found = matching.bottleneck(a, b, 1e-9)
        assert found == pytest.approx(flow(a, b), abs=1e-8), trial


def flow(a, b):
    """By perfect matchings of all points and all projections on the diagonal, radius by radius."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    n, m = len(a), len(b)
    cost = np.zeros((n + m, n + m))
    cost[:n, :m] = np.abs(a[:, None] - b[None]).max(axis=2)
    cost[:n, m:] = (a[:, 1] - a[:, 0])[:, None] / 2
    cost[n:, :m] = (b[:, 1] - b[:, 0])[None] / 2
    radii = np.unique(cost)
    low, high = -1, len(radii) - 1
    while high - low > 1:
        middle = (low + high) // 2
        graph = csr_array((cost <= radii[middle]).astype(np.int8))
        if (maximum_bipartite_matching(graph, perm_type="column") >= 0).all():
            high = middle
        else:
            low = middle
    return radii[high]


@pytest.mark.parametrize("seed", range(6))
def test_images_near_each_other_have_diagrams_near_each_other(seed):
    rng = np.random.default_rng(seed)
    x = rng.random((24, 24))
    y = np.clip(x + 0.2 * rng.random() * rng.normal(size=x.shape), 0, 1)
    a, b = diagram(x), diagram(y)
    most = np.abs(x - y).max()
    assert relative_bottleneck(a, b, exact=True) <= most / a.span + 1e-9
    for one, other in ((a.h0, b.h0), (a.h1, b.h1)):
        assert matching.bottleneck(one, other, 1e-9) == pytest.approx(flow(one, other), abs=2e-9)


def test_brightness_moves_by_exactly_its_change():
    """Where no point lies nearer to another one's new place than that one itself."""
    image = 0.8 * painted(0.2, (ring(UPPER, 5, 10), 0.9), (ring(LOWER, 5, 10), 0.7))
    once = diagram(image)
    for change in (-0.1, 0.05, 0.2):
        found = relative_bottleneck(once, diagram(image + change), exact=True)
        assert found == pytest.approx(abs(change) / once.span, abs=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_the_quick_distance_is_within_its_bound(seed):
    rng = np.random.default_rng(seed)
    x = rng.random((32, 32))
    a, b = diagram(x), diagram(np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1))
    exact = relative_bottleneck(a, b, exact=True)
    assert abs(relative_bottleneck(a, b) - exact) <= 0.01


def test_without_points_it_is_zero_or_infinite():
    blank, other = diagram(np.full((8, 8), 0.5)), diagram(np.random.default_rng(0).random((8, 8)))
    assert relative_bottleneck(blank, blank) == 0
    assert relative_bottleneck(blank, other) == np.inf
    assert relative_bottleneck(other, blank) == pytest.approx(0.5, abs=0.01)
    assert (band(blank, blank), band(blank, other), band(other, other)) == ("below", "beyond", "below")


def test_bands_are_those_of_the_distance():
    image = 0.25 + 0.5 * np.random.default_rng(0).random((24, 24))
    once = diagram(image)
    names = {0.04: "below", 0.06: "weak", 0.14: "weak", 0.16: "strong", 0.24: "strong", 0.26: "beyond"}
    for change, name in names.items():
        assert band(once, diagram(image + change * once.span)) == name
    assert BANDS["weak"][1] == BANDS["strong"][0]


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    topology._tool.cache_clear()
    monkeypatch.setitem(sys.modules, "gudhi.sklearn", None)
    with pytest.raises(UserError, match=r'pip install "kladi\[topology\]"'):
        diagram(np.zeros((3, 3)))
    monkeypatch.undo()
    topology._tool.cache_clear()


def test_examples():
    assert doctest.testmod(topology).failed == 0


def test_the_reference_sees_what_it_should():
    """A hole by hand, and two points against one."""
    image = np.zeros((5, 5))
    image[1:4, 1:4] = 1
    image[2, 2] = 0.25
    assert reference.h1(image.tolist()) == [(0, 0.75)]
    assert reference.bottleneck([(0, 1), (0, 0.5)], [(0.125, 1)]) == 0.25
    assert len(list(itertools.permutations(range(3), 2))) == 6
