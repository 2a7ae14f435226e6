"""What an evaluation's record makes of its tables."""

import numpy as np
import pytest

from moe.data.tokenizers import make_tokenizer
from moe.evaluation.evaluate import Evaluation
from moe.evaluation.record import evaluation_record

MODALITIES = [[[1.5, 0.5], [0.25, 0.75]], [[0.0, 0.0], [1.0, 0.0]]]  # [L M E] visits a token
FAVOURITES = [[[[104, 12, 1.9], [10, 3, 1.2]], []]]  # [L E] of [id, choices, lift]


def record(stem: str | None = None, **tables: list) -> dict:
    evaluation = Evaluation({}, {}, {}, None, {f"routing/{k}": v for k, v in tables.items()})
    fields = {"step": 1, "split": "valid", "domains": ("text",), "model": {}, "causality": {}}
    tokenizer = make_tokenizer("bytes", None, ())
    return evaluation_record(evaluation, **fields, tokenizer=tokenizer, speed={}, stem=stem)


@pytest.mark.parametrize(("stem", "name"), [("patches", "image"), ("conv", "audio")])
def test_loads_of_modalities_by_name_are_shares_of_choices(stem, name):
    load = record(stem, modalities=MODALITIES)["modality_load"]
    assert list(load) == ["text", name]
    np.testing.assert_allclose(load["text"], [[0.75, 0.25], [0.0, 0.0]])
    np.testing.assert_allclose(load[name], [[0.25, 0.75], [1.0, 0.0]])
    assert record()["modality_load"] == {}


def test_favourites_are_told_as_text():
    found = record(favourites=FAVOURITES)
    assert found["favourites"] == [[[["h", 12, 1.9], ["\n", 3, 1.2]], []]]
    assert found["tables"] == {}
    assert record()["favourites"] is None
