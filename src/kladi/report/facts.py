"""Results -> what the page says beside the measurements: data, structure, provenance, what was not run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from kladi.report.wording import p_value, thousands, unit, words

Results = Mapping[str, Any]


def data_facts(results: Results) -> list[tuple[str, str]]:
    """The data in one line a fact."""
    data = results.get("data", {})
    known = unit(results) == "patient"
    facts = [("images", thousands(data.get("images"))), ("patients", thousands(data.get("patients")))]
    if data.get("sites"):
        facts.append(("sites", thousands(data["sites"])))
    facts += [
        (
            ", ".join(str(part[key]) for key in ("task", "part") if key in part),
            f"{thousands(part['images'])} images" + (f" of {thousands(part['patients'])} patients" if known else ""),
        )
        for part in _parts(results)
    ]
    return [(name, value) for name, value in facts if value]


def labels(results: Results) -> list[tuple[str, str, str]]:
    """Each label with its images and patients, in the order of the file."""
    counts = results.get("data", {}).get("labels", {})
    return [(name, thousands(images), thousands(patients)) for name, (images, patients) in counts.items()]


def purity(atlas: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """What the eye guesses from the map, as numbers: column, share, share by chance, images."""
    if not atlas:
        return []
    return [
        (name, f"{entry['value']:.2f}", f"{entry['chance']:.2f}", thousands(entry["n"]))
        for name, entry in sorted(atlas.get("purity", {}).items())
        if entry.get("value") is not None
    ]


def diagnostics(results: Results) -> list[dict[str, str]]:
    """Whether the structure is in the images at all, a line a question."""
    return [
        {
            "name": str(d.get("name")),
            "verdict": str(d.get("verdict")),
            "statistic": str(d.get("statistic")),
            "value": "" if d.get("value") is None else f"{d['value']:.2f}",
            "p": p_value(d.get("p")),
            "beside": ", ".join(text for text in (str(d.get("null") or ""), str(d.get("note") or "")) if text),
        }
        for d in results.get("diagnostics", [])
    ]


def neighbours(atlas: Mapping[str, Any] | None) -> int | None:
    """How many neighbours the purity looks at."""
    found = [atlas or {}, *(atlas or {}).get("panels", [])]
    return next((entry["k"] for one in found for entry in one.get("purity", {}).values()), None)


def provenance(results: Results) -> list[tuple[str, str]]:
    """How to get here again."""
    facts = [("command", str(results.get("study", {}).get("command") or ""))]
    for key, value in sorted(results.get("provenance", {}).items()):
        facts.append((key, _listed(value)))
    facts += [
        ("results digest", str(results.get("digest", ""))),
        ("data digest", str(results.get("data", {}).get("digest", ""))),
        ("taxonomy digest", str(results.get("data", {}).get("taxonomy_digest") or "none")),
        ("split digest", _listed(results.get("splits", {}).get("digest", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def _listed(value: object) -> str:
    """`{"torch": "2.14", "numpy": "2.4"}` -> `numpy 2.4, torch 2.14`; anything else as it is."""
    return ", ".join(f"{k} {v}" for k, v in sorted(value.items())) if isinstance(value, dict) else str(value)


def not_run(results: Results) -> list[str]:
    """Values that could not be computed, with the reason; each reason once, with its count."""
    reasons: dict[str, int] = defaultdict(int)
    for row in results.get("rows", []):
        if row.get("value") is None:
            reasons[
                f"{row['method']}, {row['regime']}, {words(row['metric'])}: {row.get('reason') or 'no reason given'}"
            ] += 1
    return [text + (f" ({count} times)" if count > 1 else "") for text, count in sorted(reasons.items())]


def _parts(results: Results) -> list[Mapping[str, Any]]:
    parts = results.get("splits", {}).get("parts", [])
    return [p for p in parts if p.get("fold") == 0 and p.get("repeat") == 0]
