"""Options of training that are rarely changed, in one frozen record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyrocell.errors import TrainingError
from pyrocell.infer.adam import Adam

__all__ = ["TrainingPlan"]

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]


class _TFloat32:
    """Products in TensorFloat-32; to be entered again and again, as the recording of a step does."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.before


@dataclass(frozen=True)
class TrainingPlan:
    """What `train` does beyond its everyday arguments.

    Parameters
    ----------
    optimizer
        ``"adam"``, ``"adamw"``, or a function from parameter groups to an optimizer (which then sets its own
        learning rate, epsilon and decay).
    eps
        Adam's epsilon for networks. The field's 0.01 damps small gradients; it is meant for the per-cell loss used
        here. Parameters that are not part of a network, such as dispersions, use 1e-8: damped, they would stay where
        they started.
    betas
        Adam's decay rates of the averages of gradients and of their squares.
    weight_decay
        Decay of network weights (coupled for Adam, decoupled for AdamW). Parameters that are not part of a
        network, such as dispersions, are never decayed: towards 0 on a log scale would be a hidden prior.
    max_grad_norm
        Clip the gradient's norm at this value; None for no clipping.
    min_kl_weight, max_kl_weight
        KL weight of the local latents before and after warm-up.
    n_steps_kl_warmup
        Warm up over this many minibatches instead of over epochs.
    train_indices, validation_indices
        Rows to train on and to validate on, instead of a random split.
    validate_every
        Validate every so many epochs; None: every epoch with early stopping or a plateau schedule, else at the end.
    patience, min_delta
        Early stopping: epochs without an improvement of the validation ELBO by more than ``min_delta`` nats per
        cell. Counting starts when warm-up is over.
    lr_decay
        Part of training, at its end, over which the learning rate falls to zero on a straight line, step by step: from
        0 (never) to 1 (all of it). None: the class's ``default_lr_decay`` where ``lr`` is left out of `train` too, else
        never, so that a learning rate that is given is kept. With it, a checkpoint belongs to one ``max_epochs``.
    lr_plateau, lr_factor, lr_patience, lr_min
        Multiply the learning rate by ``lr_factor`` after ``lr_patience`` epochs without improvement.
    precision
        ``"float32"``, ``"tfloat32"`` (on CUDA alone, not for gradients) or ``"bfloat16"`` for the networks' matrix
        products; likelihoods are always float32.
    record_step
        Record the training step once and replay it, where the model (on CUDA, the optimizer too) allows that: on CUDA
        as a graph, on the CPU as a list of torch's operations, which gives the same bits. Otherwise Pyro and autograd
        take about as long as the arithmetic of a small network. Model and guide do not run in steps that are replayed:
        switch it off to watch them.
    checkpoint
        Folder that holds the newest state, written every ``checkpoint_every`` epochs; `train` goes on from it
        with ``resume=``. One that holds the checkpoint of another training is refused.
    checkpoint_every
        Epochs between checkpoints.
    max_bad_steps
        Stop with an error after so many steps in a row with a non-finite loss or gradient.
    hash_data
        Record the SHA-256 of the data in the model's manifest. It takes one more reading of them, about a tenth of an
        epoch's time on a CPU.
    """

    optimizer: str | OptimizerFactory = "adam"
    eps: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-6
    max_grad_norm: float | None = None
    min_kl_weight: float = 0.0
    max_kl_weight: float = 1.0
    n_steps_kl_warmup: int | None = None
    train_indices: Sequence[int] | None = None
    validation_indices: Sequence[int] | None = None
    validate_every: int | None = None
    patience: int = 45
    min_delta: float = 0.0
    lr_decay: float | None = None
    lr_plateau: bool = False
    lr_factor: float = 0.6
    lr_patience: int = 30
    lr_min: float = 0.0
    precision: str = "float32"
    record_step: bool = True
    checkpoint: str | Path | None = None
    checkpoint_every: int = 10
    max_bad_steps: int = 10
    hash_data: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible options by name."""
        if isinstance(self.optimizer, str) and self.optimizer not in ("adam", "adamw"):
            raise TrainingError(
                f"optimizer is {self.optimizer!r}; expected 'adam', 'adamw' or a function from parameters to a "
                "torch optimizer."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"betas is {self.betas}; expected two numbers from 0 to below 1.")
        if self.precision not in ("float32", "tfloat32", "bfloat16"):
            raise TrainingError(
                f"precision is {self.precision!r}; expected 'float32', 'tfloat32' or 'bfloat16'."
            )
        if not 0 <= self.min_kl_weight <= self.max_kl_weight:
            raise TrainingError(
                f"KL weights go from {self.min_kl_weight} to {self.max_kl_weight}; expected 0 <= min_kl_weight <= "
                "max_kl_weight."
            )
        if self.lr_decay is not None and not 0 <= self.lr_decay <= 1:
            raise TrainingError(f"lr_decay is {self.lr_decay}; expected a part of training, from 0 to 1.")
        if self.lr_decay and self.lr_plateau:
            raise TrainingError(
                f"lr_decay is {self.lr_decay} and lr_plateau is on; both lower the learning rate. Choose one of them."
            )
        for name in ("validate_every", "patience", "lr_patience", "checkpoint_every", "max_bad_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainingError(f"{name} is {value}; expected an integer of at least 1.")
        if self.validation_indices is not None and self.train_indices is None:
            raise TrainingError(
                "validation_indices needs train_indices; give both, or use train_size and validation_size."
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise TrainingError(f"max_grad_norm is {self.max_grad_norm}; expected a positive number or None.")

    def make_optimizer(
        self, named: Iterable[tuple[str, torch.nn.Parameter]], lr: float
    ) -> torch.optim.Optimizer:
        """Build the optimizer.

        Parameters
        ----------
        named
            Parameters by name; a dot in the name says that it belongs to a network.
        lr
            Learning rate.
        """
        named = [(name, p) for name, p in named if p.requires_grad]
        networks = [p for name, p in named if "." in name]
        own = [p for name, p in named if "." not in name]
        groups: list[dict[str, Any]] = [
            {"params": networks, "weight_decay": self.weight_decay, "eps": self.eps},
            # The gradient of one feature's parameter is far below the networks' epsilon, which would freeze it.
            {"params": own, "weight_decay": 0.0, "eps": min(self.eps, 1e-8)},
        ]
        groups = [group for group in groups if group["params"]]
        if callable(self.optimizer):
            return self.optimizer([{"params": group["params"]} for group in groups])
        kind = Adam if self.optimizer == "adam" else torch.optim.AdamW
        fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
        return kind(groups, lr=lr, betas=self.betas, fused=fused)

    def products(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context in which the networks' matrix products have the precision asked for.

        Parameters
        ----------
        device
            Where they are computed.
        """
        if self.precision == "bfloat16":
            # Casts that were kept from one step would be lost to a recorded one.
            return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=device.type != "cuda")
        return _TFloat32() if self.precision == "tfloat32" else nullcontext()

    def kl_weight(self, epoch: int, step: int, n_epochs: int) -> float:
        """Return the KL weight at some point of training.

        Parameters
        ----------
        epoch, step
            Epochs and minibatches done so far.
        n_epochs
            Epochs that warm-up takes.
        """
        if self.n_steps_kl_warmup is not None:
            done = step / self.n_steps_kl_warmup if self.n_steps_kl_warmup else 1.0
        else:
            done = epoch / n_epochs if n_epochs else 1.0
        if done >= 1.0:  # exactly: early stopping waits for this very number
            return self.max_kl_weight
        return self.min_kl_weight + (self.max_kl_weight - self.min_kl_weight) * min(1.0, done)

    def decisive(self) -> dict[str, Any]:
        """Return the options that decide how training goes, as plain values: what a checkpoint must agree in."""
        other = {"checkpoint", "checkpoint_every", "max_bad_steps", "record_step", "hash_data"}
        # Where the learning rate falls, `schedule.Decay` says so, together with the number of epochs.
        other |= {"train_indices", "validation_indices", "lr_decay"}
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in other}
        record["betas"] = list(self.betas)
        record["optimizer"] = self.optimizer if isinstance(self.optimizer, str) else "custom"
        return record
