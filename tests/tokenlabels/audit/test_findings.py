"""Rules about classes, at their borders. Rules about maps are tested with whole label sets."""

import pytest

from tokenlabels.audit.classes import ClassAudit
from tokenlabels.audit.findings import FEW_IMAGES, KINDS, LOW_CLASS, NEVER_PREDICTED, UNUSABLE, Finding, about_classes


def known(name: str, num_images: int, num_agreeing: int, num_predicted: int = 1) -> ClassAudit:
    return ClassAudit(0, name, num_images, num_agreeing, num_predicted, None, None, None, None)


GOOD = known("good", 1000, 800)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        pytest.param(known("odd", 100, 30), [LOW_CLASS], id="low"),
        pytest.param(known("odd", 100, 50), [], id="half as often and more"),
        pytest.param(known("odd", FEW_IMAGES - 1, 0), [], id="too few to tell"),
        pytest.param(known("odd", FEW_IMAGES, 0), [LOW_CLASS], id="enough to tell"),
        pytest.param(known("odd", 100, 0, 0), [NEVER_PREDICTED], id="never predicted"),
        pytest.param(known("odd", 0, 0, 0), [], id="not in the data set"),
    ],
)
def test_classes_that_stand_out(odd: ClassAudit, expected: list[str]) -> None:
    findings = [*about_classes([GOOD, odd])]
    assert [finding.kind for finding in findings] == expected
    assert all((finding.key, finding.shard) == ("", "") and "odd" in finding.detail for finding in findings)


def test_the_lowest_comes_first() -> None:
    classes = [known("b", 100, 20), GOOD, known("a", 100, 10)]
    assert [*about_classes(classes)] == [
        Finding(LOW_CLASS, "", "", "a: 10 of 100, 69.2% of all images"),
        Finding(LOW_CLASS, "", "", "b: 20 of 100, 69.2% of all images"),
    ]


def test_nothing_is_said_where_no_class_is_known() -> None:
    assert [*about_classes([known("a", 0, 0, 5), known("b", 0, 0, 0)])] == []


def test_what_makes_labels_unusable_is_a_kind_of_finding() -> None:
    assert set(UNUSABLE) <= set(KINDS)
