"""Which column of a manifest means what: known names for each role, in any case; never two for one role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kladi.data.findings import listed, quoted
from kladi.errors import UserError, suggestion

ROLES: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "image", "file", "filename", "file_name", "image_path", "filepath", "file_path", "img_dir"),
    "label": ("label", "class", "target", "diagnosis"),
    "patient_id": ("patient_id", "patient", "subject_id", "subject", "PatientID", "participant_id", "case"),
    "split": ("split",),
    "frame": ("frame",),
}
"""Role -> the column names that stand for it; the first is the name we use when we speak of it."""
IDENTIFYING = ("path", "patient_id", "split", "frame")
"""Roles that can never be metadata: they name a file or a person, or say what a row is for."""
ATTRIBUTES = ("modality", "anatomy", "laterality", "view", "device")
"""What the tags of DICOM files give, as columns."""


@dataclass(frozen=True)
class Columns:
    """Who is who in a header.

    role: role -> name of its column, as the file spells it; roles without a column are absent.
    metadata: name as asked for -> name of the column, as the file spells it.
    absent: names asked for as metadata that are no column, but that the tags of DICOM files may give.
    """

    role: Mapping[str, str]
    metadata: Mapping[str, str]
    absent: tuple[str, ...] = ()

    @property
    def aliases(self) -> dict[str, str]:
        """Role or metadata name -> column, where the two are not spelt the same."""
        return {name: column for name, column in {**self.role, **self.metadata}.items() if name != column}


def recognise(names: Sequence[str], metadata: Iterable[str], where: str, *, dicom: bool) -> Columns:
    """The role of each column.

    Args:
        names: the header.
        metadata: columns that are asked for as label sets.
        where: the file, for messages.
        dicom: whether rows may be DICOM files, whose tags stand in for a column that is missing.

    Raises:
        UserError: no column with paths, two columns for one role, or metadata that is no column.
    """
    role: dict[str, str] = {}
    for name, known in ROLES.items():
        spellings = {_folded(alias) for alias in known}
        found = [column for column in names if _folded(column) in spellings]
        if len(found) > 1:
            both = ", ".join(quoted(column) for column in found)
            raise UserError(f"{where}: columns {both} all mean {name}; rename or remove all but one")
        if found:
            role[name] = found[0]
    if "path" not in role:
        columns = listed([quoted(name) for name in names], 20) or "none"
        raise UserError(f"{where} has no column with paths; columns: {columns}; known: {', '.join(ROLES['path'])}")
    chosen, absent = _metadata(names, metadata, role, where, dicom=dicom)
    return Columns(role, chosen, absent)


def _metadata(
    names: Sequence[str], metadata: Iterable[str], role: Mapping[str, str], where: str, *, dicom: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    chosen: dict[str, str] = {}
    absent: list[str] = []
    for asked in dict.fromkeys(metadata):
        exact = [name for name in names if name == asked]
        alike = exact or [name for name in names if _folded(name) == _folded(asked)]
        if len(alike) > 1:
            both = ", ".join(quoted(column) for column in alike)
            raise UserError(f"{where}: columns {both} all mean metadata {quoted(asked)}; rename or remove all but one")
        if alike:
            meant = next((r for r, column in role.items() if column == alike[0] and r in IDENTIFYING), None)
            if meant:
                raise UserError(f"--data.metadata {asked}: this column is the {meant} of each row, no metadata")
            chosen[asked] = alike[0]
        elif dicom and asked in ATTRIBUTES:
            absent.append(asked)
        else:
            others = [name for name in names if name not in {role.get(r) for r in IDENTIFYING}]
            options = [*others, *(ATTRIBUTES if dicom else ())]
            raise UserError(f"--data.metadata {asked} is no column of {where}{suggestion(asked, options)}")
    return chosen, tuple(absent)


def means(name: str, role: str) -> bool:
    """Whether a column of this name is taken for that role."""
    return _folded(name) in {_folded(alias) for alias in ROLES[role]}


def _folded(name: str) -> str:
    """`Patient ID`, `patient-id` and `PatientID` are one name."""
    return "".join(c for c in name.casefold() if c not in " _-.")
