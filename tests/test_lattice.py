"""A lattice is a value: its structures in one order, its ranks, and who meets whom."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kladi.structure.lattice import Lattice, all_structures


def test_three_modalities_have_seven_structures_the_largest_first():
    assert all_structures(3) == ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,))
    assert Lattice.of(3, 2).structures == all_structures(3)
    assert Lattice.of(3, 2).width == 14
    assert Lattice.of(3, 2).names == ("0+1+2", "0+1", "0+2", "1+2", "0", "1", "2")


@given(st.integers(1, 5), st.data())
def test_the_order_of_what_is_named_does_not_matter(modalities, data):
    structures = all_structures(modalities)
    ranks = {s: data.draw(st.integers(0, 3)) for s in structures}
    if not any(ranks.values()):
        with pytest.raises(ValueError, match="no structure has a rank"):
            Lattice.of(modalities, ranks)
        return
    one = Lattice.of(modalities, ranks)
    shuffled = data.draw(st.permutations(list(ranks.items())))
    other = Lattice.of(modalities, {"+".join(map(str, reversed(s))): rank for s, rank in shuffled})
    assert one == other
    assert hash(one) == hash(other)
    assert one.digest == other.digest
    assert one.structures == tuple(s for s in structures if ranks[s])
    assert all(one.rank(s) == rank for s, rank in ranks.items())


@given(st.integers(2, 4), st.data())
def test_who_meets_whom(modalities, data):
    lattice = Lattice.of(modalities, {s: data.draw(st.integers(1, 2)) for s in all_structures(modalities)})
    sets = data.draw(st.lists(st.sets(st.integers(0, modalities - 1), min_size=1), min_size=1, max_size=2))
    found = lattice.meeting(*sets)
    for structure, place in lattice.columns():
        assert found[place].all() == found[place].any() == all(set(structure) & one for one in sets)
    for m in range(modalities):
        assert (lattice.of_modality(m) == lattice.meeting([m])).all()


def test_columns_part_the_scores():
    lattice = Lattice.of(3, {"0+1+2": 2, "1": 3})
    assert list(lattice.columns()) == [((0, 1, 2), slice(0, 2)), ((1,), slice(2, 5))]
    assert lattice.of_modality(0).tolist() == [True, True, False, False, False]
    assert str(lattice) == "0+1+2 (2), 1 (3)"


@pytest.mark.parametrize(
    ("modalities", "ranks", "said"),
    [
        (3, {"0+3": 1}, '"0[+]3" is no structure of 3 modalities; closest: "0[+]'),
        (2, {"": 1}, '"" is no structure'),
        (2, {"0+0": 1}, "is no structure"),
        (2, {"0": -1}, "rank of 0 is -1; it takes 0 or more"),
        (2, {"0": True}, "rank of 0 is True"),
        (2, {"0+1": 1, "1+0": 1}, "named twice"),
        (2, 0, "no structure has a rank"),
        (9, 1, "9 modalities: 1 to 8"),
    ],
)
def test_what_is_no_lattice_is_refused(modalities, ranks, said):
    with pytest.raises(ValueError, match=said):
        Lattice.of(modalities, ranks)


@pytest.mark.parametrize(
    ("structures", "ranks"),
    [(((0,), (0, 1)), (1, 1)), (((0, 1),), ()), (((1, 0),), (1,)), (((0, 2),), (1,)), (((),), (1,)), (((0,),), (0,))],
)
def test_a_lattice_by_hand_is_checked(structures, ranks):
    with pytest.raises(ValueError):
        Lattice(2, structures, ranks)


def test_every_structure_is_there_once():
    for m in range(1, 6):
        found = all_structures(m)
        assert len(found) == len(set(found)) == 2**m - 1
        assert all(len(a) >= len(b) for a, b in itertools.pairwise(found))
        assert np.all([list(s) == sorted(s) for s in found])
