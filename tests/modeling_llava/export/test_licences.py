"""What does not fit between the licence of a model and those of its parts."""

import pytest

from modeling_llava.export.repository_check import Part, find_conflicts


def conflicts(license_id: str, part_license: str | None, *, kind: str = "data") -> list[str]:
    return find_conflicts(license_id, [Part(name="it", kind=kind, license=part_license)])


@pytest.mark.parametrize(
    "license_id, part_license, kind, expected",
    [
        ("apache-2.0", "cc-by-nc-4.0", "data", "which forbids commercial use; apache-2.0 does not"),
        ("llama2", "cc-by-nc-sa-4.0", "data", "which forbids commercial use; llama2 does not"),
        ("other", "cc-by-nc-4.0", "data", "which forbids commercial use; the terms of the model have to be read"),
        ("apache-2.0", "cc-by-sa-4.0", "data", "which asks derivatives to be shared alike; the model is under apache"),
        ("mit", "cc-by-nd-4.0", "data", "which allows no derivatives"),
        ("apache-2.0", "llama2", "base model", "whose terms derivatives carry on; the model is under apache-2.0"),
        ("mit", "gemma", "base model", "whose terms derivatives carry on"),
        ("llama3.1", "llama2", "base model", "whose terms derivatives carry on"),
        ("mit", None, "data", "the licence of data it is not stated"),
        ("mit", "unknown", "base model", "the licence of base model it is not stated"),
        ("mit", "other", "data", "data it has terms of its own, which have to be read"),
    ],
)
def test_conflicts(license_id, part_license, kind, expected):
    assert any(expected in conflict for conflict in conflicts(license_id, part_license, kind=kind))


@pytest.mark.parametrize(
    "license_id, part_license, kind",
    [
        ("apache-2.0", "mit", "base model"),
        ("apache-2.0", "cc-by-4.0", "data"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", "data"),
        ("llama2", "llama2", "base model"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0", "data"),
    ],
)
def test_what_fits(license_id, part_license, kind):
    assert conflicts(license_id, part_license, kind=kind) == []
