"""Sizes of the shared representation and the numbers of its gradient steps."""

from __future__ import annotations

import dataclasses

from mmrf_jax.embeddings import table

OPTIMIZERS = ("adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What agents and the feedback model have in common; hashable, so jitted functions can close over it.

    Attributes:
      decays: of the user memory, for each exposure.
      dropout: on looked-up embedding rows and on the user state; in training, and where uncertainty is measured.
      learning_rate: of Adam. table_learning_rate: of row-wise Adagrad.
      optimizer: `adamw`, or `sgd` for checks of invariance.
      signal_weights: of the feedback losses, SIGNALS order; rare signals weigh more, or they leave no trace.
      max_rows: of an embedding table; ids of a larger vocabulary share rows by hash.
      table_dtype: of its rows, `float32` or `bfloat16`.
    """

    slate: int = 6
    dim: int = 32  # of an item encoding, its features not counted
    id_dim: int = 8
    author_dim: int = 8
    tag_dim: int = 8
    user_dim: int = 8
    feedback_dim: int = 8
    decays: tuple[float, ...] = (0.98, 0.8)
    state_dim: int = 64  # of a user state, profile and context not counted
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-4
    table_learning_rate: float = 0.05
    dropout: float = 0.0
    optimizer: str = "adamw"
    max_rows: int = 2**27
    table_dtype: str = "float32"
    signal_weights: tuple[float, ...] = (1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0)

    def __post_init__(self):
        room = f"{self.room}.dim={self.dim} leaves no room beside {self.room}.id_dim={self.id_dim}; use a larger dim"
        if self.dim <= self.id_dim + 1:
            raise ValueError(room)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{self.room}.dropout={self.dropout} is not in [0, 1); use 0 for none")
        if self.max_rows < 1:
            raise ValueError(f"{self.room}.max_rows={self.max_rows} is no number of rows; use 1 or more")
        if self.table_dtype not in table.DTYPES:
            raise ValueError(f"unknown {self.room}.table_dtype={self.table_dtype!r}; use {' or '.join(table.DTYPES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown {self.room}.optimizer={self.optimizer!r}; use {' or '.join(OPTIMIZERS)}")

    @property
    def room(self) -> str:
        """Where the fields stand in a run's config, for messages."""
        return "agents"

    @property
    def table_dims(self) -> dict[str, int]:
        """Width of the embedding rows of each table."""
        return {"author": self.author_dim, "id": self.id_dim, "tag": self.tag_dim, "user": self.user_dim}
