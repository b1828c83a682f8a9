"""A directive that makes the table of models by verbs from the models themselves."""

from __future__ import annotations

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import pyrocell

# Methods for authors of models and for the engine.
PLUMBING = {
    "model",
    "guide",
    "plate",
    "elbo",
    "drawer",
    "finish",
    "running",
    "asking",
    "require_data",
    "require_trained",
}


def public_models() -> list[type]:
    """Every public model, in reading order."""
    things = [getattr(pyrocell, name) for name in pyrocell._OBJECTS]
    base = pyrocell.CellModel
    return [
        thing for thing in things if isinstance(thing, type) and issubclass(thing, base) and thing is not base
    ]


def public_verbs(model: type) -> list[str]:
    """Public methods of a model, in the order of its classes and files."""
    verbs: dict[str, None] = {}
    for owner in reversed(model.__mro__):
        if owner.__module__.startswith("pyrocell"):
            verbs |= dict.fromkeys(name for name in vars(owner) if is_verb(model, name))
    return list(verbs)


def is_verb(model: type, name: str) -> bool:
    """Whether ``name`` is something that a user calls on a model."""
    if name.startswith("_") or name in PLUMBING:
        return False
    thing = getattr(model, name, None)
    return callable(thing) and not isinstance(thing, type)


class Capabilities(SphinxDirective):
    """``{capabilities}``: rows are verbs, columns are models."""

    def run(self) -> list[nodes.Node]:
        """Write the table as Markdown and parse it."""
        models = public_models()
        verbs = list(dict.fromkeys(verb for model in models for verb in public_verbs(model)))
        lines = ["| verb | " + " | ".join(model.__name__ for model in models) + " |"]
        lines.append("| --- |" + " :---: |" * len(models))
        for verb in verbs:
            marks = ["yes" if is_verb(model, verb) else "" for model in models]
            lines.append(f"| `{verb}` | " + " | ".join(marks) + " |")
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, source="capabilities"), self.content_offset, parent)
        return parent.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("capabilities", Capabilities)
    return {"parallel_read_safe": True}
