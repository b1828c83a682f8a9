"""A directive that makes the table of models by verbs from the models themselves."""

from __future__ import annotations

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import pyrocell
from pyrocell.models.roles import capabilities


def public_models() -> list[type]:
    """Every public model, in reading order."""
    things = [getattr(pyrocell, name) for name in pyrocell._OBJECTS]
    base = pyrocell.CellModel
    return [
        thing for thing in things if isinstance(thing, type) and issubclass(thing, base) and thing is not base
    ]


class Capabilities(SphinxDirective):
    """``{capabilities}``: rows are verbs, columns are models."""

    def run(self) -> list[nodes.Node]:
        """Write the table as Markdown and parse it."""
        models = public_models()
        lines = ["| verb | " + " | ".join(model.__name__ for model in models) + " |"]
        lines.append("| --- |" + " :---: |" * len(models))
        for verb, having in capabilities(models).items():
            lines.append(
                f"| `{verb}` | " + " | ".join("yes" if has else "" for has in having.values()) + " |"
            )
        parent = nodes.Element()
        self.state.nested_parse(StringList(lines, source="capabilities"), self.content_offset, parent)
        return parent.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("capabilities", Capabilities)
    return {"parallel_read_safe": True}
