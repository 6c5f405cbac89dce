"""Which part of the body: one term through the ladder of synonyms, several sources into one answer."""

from __future__ import annotations

from collections.abc import Iterable

from kladi.structure.synonyms import Synonyms, shipped


def normalise_anatomy(
    text: str | None, *, loose: bool = True, synonyms: Synonyms | None = None
) -> tuple[frozenset[str], str]:
    """Canonical body parts of a free term, and the rung of the ladder it landed on (`synonyms.RUNGS`).

    >>> normalise_anatomy("ABD PEL") == (frozenset({"abdomen", "pelvis"}), "exact")
    True
    >>> normalise_anatomy("HEAD OF FEMUR")
    (frozenset(), 'unmapped')

    Args:
        text: e.g. BodyPartExamined (0018,0015) or a CodeMeaning (0008,0104); at most 16 characters in the former, so
            values may be cut.
        loose: also try single words, where all that map agree. It may find only a part: `PET_ABDOMEN_PEL` is abdomen.
        synonyms: the map; the shipped one if not given.

    Returns:
        The values, none where nothing is known; and the rung: exact, compact, compound, loose, unknown (the term says
        so, or there is none), unmapped.
    """
    return (synonyms or shipped()).look_up("anatomy", text or "", loose=loose)


def combine_anatomy(
    sources: Iterable[frozenset[str]], *, synonyms: Synonyms | None = None
) -> tuple[frozenset[str], bool]:
    """One answer of several sources, e.g. BodyPartExamined and AnatomicRegionSequence, in that order.

    Sources that know nothing are passed over. Two that are equal or overlap give their union; where every value of one
    is part of a value of the other (lung, chest) the parts are meant; where they are disjoint nothing is known.

    Returns:
        The values, and whether two sources contradicted each other (the values are none then).
    """
    part_of = (synonyms or shipped()).part_of.get("anatomy", {})
    answer: frozenset[str] = frozenset()
    for values in sources:
        if not values or not answer:
            answer = answer or values
        elif answer & values:
            answer |= values
        elif all(part_of.get(value) in answer for value in values):
            answer = values
        elif not all(part_of.get(value) in values for value in answer):
            return frozenset(), True
    return answer, False
