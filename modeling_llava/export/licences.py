"""Whether the licence of a model fits those of its parts. Reports what a person should look at; no legal advice."""

from dataclasses import dataclass

NON_COMMERCIAL = frozenset(
    {
        "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "deepfloyd-if-license", "fair-noncommercial-research-license",
        "h-research", "intel-research",
    }
)  # fmt: skip
NO_DERIVATIVES = frozenset({"cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0"})
SHARE_ALIKE = frozenset(
    {
        "agpl-3.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
        "cdla-sharing-1.0", "gpl", "gpl-2.0", "gpl-3.0", "odbl",
    }
)  # fmt: skip
PASSED_ON = frozenset(
    {"gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "openrail", "creativeml-openrail-m"}
)
"""Licences of models whose terms every derivative carries on."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something a model was made of."""

    name: str
    kind: str
    """"base model" or "data"."""
    license: str | None
    """Identifier of the Hub; None where nobody said."""


def find_conflicts(license_id: str, parts: list[Part]) -> list[str]:
    """What does not fit, one sentence each.

    Args:
        license_id: Of the model, as the Hub calls it.
    """
    conflicts = []
    for part in parts:
        named = f"{part.kind} {part.name} is under {part.license}"
        if part.license is None or part.license == "unknown":
            conflicts.append(f"the licence of {part.kind} {part.name} is not stated")
        elif part.license == "other":
            conflicts.append(f"{part.kind} {part.name} has terms of its own, which have to be read")
        if part.license in NO_DERIVATIVES:
            conflicts.append(f"{named}, which allows no derivatives")
        if part.license in NON_COMMERCIAL and license_id not in NON_COMMERCIAL:
            own = "the terms of the model have to be read" if license_id == "other" else f"{license_id} does not"
            conflicts.append(f"{named}, which forbids commercial use; {own}")
        if part.license in SHARE_ALIKE and part.license != license_id:
            conflicts.append(f"{named}, which asks derivatives to be shared alike; the model is under {license_id}")
        if part.kind == "base model" and part.license in PASSED_ON and part.license != license_id:
            conflicts.append(f"{named}, whose terms derivatives carry on; the model is under {license_id}")
    return conflicts
