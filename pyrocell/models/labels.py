"""What models that tell labels share: options of those that learn them, and the table of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import pandas as pd
import torch

from pyrocell.data import Cells
from pyrocell.errors import SetupError
from pyrocell.models.asking import Question

__all__ = ["ClassifierOptions", "probability_table"]


def probability_table(
    question: Question, tell: Callable[[Cells], torch.Tensor], labels: Sequence[str]
) -> pd.DataFrame:
    """Ask for probabilities of labels, block by block: a table of cells by labels.

    Parameters
    ----------
    question
        Which cells.
    tell
        Returns the probabilities of some cells, shape (B, n_labels).
    labels
        Their names.
    """
    probabilities = torch.cat([tell(cells) for _, cells in question.blocks()]).cpu().numpy()
    names = question.dataset.obs_names[question.rows]
    return pd.DataFrame(probabilities, index=names, columns=list(labels))


@dataclass(frozen=True)
class ClassifierOptions:
    """How labels are learned, and told from the latent.

    Attributes
    ----------
    weight
        Weight of the classifier's cross-entropy, where the bound of one cell counts once.
    class_weights
        ``"balanced"`` lets every class count alike, however few its labelled cells; None lets every cell count alike.
    n_layers
        Hidden layers of the classifier; 0 for a linear one.
    dropout
        Dropout in its hidden layers.
    encoder_gradient
        How much of the cross-entropy's gradient reaches the encoder of z, from 0 to 1. With 0 labels shape the latent
        through the bound alone; with 1, as published, few labels are learned by heart.

    Raises
    ------
    SetupError
        If a value is impossible.
    """

    weight: float = 50.0
    class_weights: Literal["balanced"] | None = None
    n_layers: int = 1
    dropout: float = 0.1
    encoder_gradient: float = 0.0

    @classmethod
    def of(cls, given: object) -> ClassifierOptions:
        """Return options as they are, defaults for None; a saved model has them as a dict of their values.

        Parameters
        ----------
        given
            What a constructor was given.
        """
        if isinstance(given, Mapping) and set(given) <= {field.name for field in fields(cls)}:
            return cls(**given)
        if given is not None and not isinstance(given, cls):
            names = ", ".join(field.name for field in fields(cls))
            raise SetupError(
                f"classifier is {given!r}; expected ClassifierOptions(...), with {names}, or None."
            )
        return cls() if given is None else given

    def __post_init__(self) -> None:
        expected = {
            "weight": ("a number above 0", 0 < self.weight < math.inf),
            "class_weights": ("'balanced' or None", self.class_weights in ("balanced", None)),
            "n_layers": (
                "a whole number of at least 0",
                isinstance(self.n_layers, int) and self.n_layers >= 0,
            ),
            "dropout": ("a fraction below 1", 0 <= self.dropout < 1),
            "encoder_gradient": ("a fraction", 0 <= self.encoder_gradient <= 1),
        }
        for name, (wanted, right) in expected.items():
            if not right:
                raise SetupError(f"ClassifierOptions: {name} is {getattr(self, name)!r}; expected {wanted}.")
