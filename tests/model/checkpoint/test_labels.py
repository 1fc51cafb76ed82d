"""What a model directory says of its labels."""

from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.card import read_card
from model.errors import ModelRefused
from model.sampling.labels import Labels
from tests.model.convert.directories import write_model

NAMES = "id2label must be of names, each of 1..100 printable characters, none of them random"
REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "labels of a net that knows none": (
        0,
        {"null_label": 1},
        "null_label must be absent: the net knows no labels",
    ),
    "a null label beyond": (4, {"null_label": 4}, "null_label must be an integer in 0..3, got 4"),
    "a null label that is all": (1, {"null_label": 0}, "null_label must be absent: it is the only label, got 0"),
    "guidance without a null label": (4, {"guidance": 2}, "guidance must be 1 or absent, for there is no null_label"),
    "too much guidance": (4, {"null_label": 3, "guidance": 21}, "guidance must be a number in 0.0..20.0, got 21"),
    "names that are no object": (4, {"id2label": 3}, "id2label must be an object of names by label, from 0 to 3"),
    "a name of no label": (4, {"id2label": {"4": "a"}}, "id2label must be an object of names by label, from 0 to 3"),
    "a name that is a number": (4, {"id2label": {"0": 7}}, NAMES),
    "a name that is taken": (4, {"id2label": {"0": "random"}}, NAMES),
    "an empty name": (4, {"id2label": {"0": ""}}, NAMES),
}


def test_labels_have_names_a_null_label_and_guidance(tmp_path: Path) -> None:
    index = {"id2label": {"0": "cat", "1": "dog"}, "null_label": 3, "guidance": 2.5}

    card = read_card(write_model(tmp_path, labels=4, index=index))

    assert card.labels == Labels(count=4, null=3, names={0: "cat", 1: "dog"}, guidance=2.5)
    assert read_card(write_model(tmp_path / "bare", labels=4)).labels == Labels(count=4)
    assert read_card(write_model(tmp_path / "none")).labels is None


@pytest.mark.parametrize(("labels", "index", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_labels_that_cannot_be_are_refused_by_name(
    tmp_path: Path, labels: int, index: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelRefused) as refusal:
        read_card(write_model(tmp_path, labels=labels, index=index))
    assert message in str(refusal.value)
