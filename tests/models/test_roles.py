"""The table of models by verbs tells the truth: a verb is there, and tested, or it is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyrocell
from pyrocell.models.roles import capabilities, verbs
from tests.models.zoo import BatchVAE, NoLatent, PoissonFactors

TESTS = Path(__file__).resolve().parents[1]


def public_models() -> list[type]:
    things = [getattr(pyrocell, name) for name in pyrocell._OBJECTS]
    base = pyrocell.CellModel
    return [
        thing for thing in things if isinstance(thing, type) and issubclass(thing, base) and thing is not base
    ]


MODELS = public_models()
OWN = [BatchVAE, NoLatent, PoissonFactors]
TABLE = capabilities([*MODELS, *OWN])


@pytest.mark.parametrize("model_class", [*MODELS, *OWN])
def test_a_verb_is_there_or_it_is_not(model_class):
    for verb, having in TABLE.items():
        if having[model_class.__name__]:
            assert callable(getattr(model_class, verb)), verb
            assert getattr(model_class, verb).__doc__, f"{verb} says nothing of itself"
        else:
            with pytest.raises(AttributeError):
                getattr(model_class, verb)


def test_the_table_follows_the_declared_roles():
    for model_class in [*MODELS, *OWN]:
        for verb, present in verbs(model_class).items():
            assert TABLE[verb][model_class.__name__] is present
    without = {name for name, has in TABLE["get_latent_representation"].items() if not has}
    assert without == {"NoLatent", "Tangram", "CellAssign", "RNAStereoscope", "SpatialStereoscope"}
    assert not TABLE["load_query_data"]["PoissonFactors"], "a model without a guide of its own cannot map"


def test_a_role_declared_or_taken_back_changes_the_table():
    silent = type("Silent", (BatchVAE,), {"latent_site": None})
    assert capabilities([BatchVAE])["get_latent_representation"] == {"BatchVAE": True}
    assert capabilities([silent])["get_latent_representation"] == {"Silent": False}


def test_no_plumbing_in_the_table():
    assert not {"model", "guide", "elbo", "attach", "plate"} & set(TABLE)
    assert {"train", "save", "load", "setup_anndata"} <= set(TABLE)


def test_every_verb_of_a_public_model_is_called_by_a_test():
    text = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    text += (Path(pyrocell.__path__[0]) / "testing" / "asking.py").read_text(encoding="utf-8")
    untested = [verb for verb in capabilities(MODELS) if not re.search(rf"[.\"]{verb}[(\"]", text)]
    assert not untested


def test_the_page_shows_the_table_made_from_the_models():
    docs = TESTS.parent / "docs"
    assert "```{capabilities}" in (docs / "user_guide/models/index.md").read_text(encoding="utf-8")
    program = (docs / "capabilities.py").read_text(encoding="utf-8")
    assert "capabilities(models)" in program and not re.search(r"get_\w+", program), (
        "nothing is listed by hand"
    )
