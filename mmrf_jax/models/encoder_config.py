"""Configuration of the shared representation: its sizes and the hyperparameters of its gradient steps."""

from __future__ import annotations

import dataclasses

from mmrf_jax import fields
from mmrf_jax.fields import field
from mmrf_jax.signals import SHORT_VIDEO, Signals

OPTIMIZERS = ("adamw", "sgd")
DTYPES = ("float32", "bfloat16")
ENCODERS = ("memory", "gru", "transformer")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Configuration shared by agents and the feedback model; hashable, so jitted functions can close over it.

    Raises:
      ValueError: if values are invalid, alone or in combination.
    """

    all_signals: Signals = dataclasses.field(  # S, as the log's spec names them
        default=SHORT_VIDEO, metadata={"internal": True}
    )
    slate: int = field(6, "K, videos of a slate", fields.NATURAL, internal=True)
    encoder: str = field(
        "memory",
        "how requests become a user state: decayed sums of feedback (`memory`), a `gru`, or a causal `transformer`",
        among=ENCODERS,
    )
    window: int = field(16, "W, the last requests of a user that encoder=transformer attends to", fields.WIDTH)
    dim: int = field(32, "width of an item encoding, its features not counted", fields.WIDTH)
    id_dim: int = field(8, "width of a video's embedding row", fields.WIDTH)
    author_dim: int = field(8, "width of an author's embedding row", fields.WIDTH, internal=True)
    tag_dim: int = field(8, "width of a tag's embedding row", fields.WIDTH, internal=True)
    user_dim: int = field(8, "width of a user's embedding row, where users are known", fields.WIDTH)
    feedback_dim: int = field(8, "width of encoded feedback in the user memory", fields.WIDTH, internal=True)
    decays: tuple[float, ...] = field(
        (0.98, 0.8), "decays of the user memory, for each exposure", fields.SHARE, internal=True
    )
    state_dim: int = field(64, "width of a user state, profile and context not counted", fields.WIDTH, internal=True)
    learning_rate: float = field(1.5e-3, "of Adam", fields.NOT_NEGATIVE)
    weight_decay: float = field(1e-4, "decoupled weight decay of Adam", fields.NOT_NEGATIVE, internal=True)
    table_learning_rate: float = field(0.02, "of row-wise Adagrad", fields.NOT_NEGATIVE)
    dropout: float = field(
        0.0,
        "rate for embedding rows and the user state, in training and when uncertainty is measured",
        fields.DROPOUT,
    )
    optimizer: str = field("adamw", "`sgd` is for checks of invariance", among=OPTIMIZERS, internal=True)
    max_rows: int = field(
        2**27,
        "most rows of an embedding table; ids of a larger vocabulary share rows by hash",
        fields.COUNT,
        optional=True,
    )
    table_dtype: str = field(
        "float32", "of the rows of embedding tables; bfloat16 takes half the memory", among=DTYPES, optional=True
    )
    compute_dtype: str = field(
        "float32",
        "of the operands of products in encoders and heads; bfloat16 is for accelerators; all else stays float32",
        among=DTYPES,
        optional=True,
    )
    signal_weights: tuple[float, ...] = field(
        (),
        "of the feedback losses, in the order of the signals; empty: as each signal says (`mmrf_jax.Signal.weight`)",
        fields.NOT_NEGATIVE,
    )

    def __post_init__(self):
        fields.check(self, self.room)
        if self.dim <= self.id_dim + 1:
            raise ValueError(
                f"{self.room}.dim={self.dim} leaves no room for {self.room}.id_dim={self.id_dim}; use a larger dim"
            )

    def check_signals(self) -> None:
        """Check the fields that name or count signals, once the log's are known.

        Raises:
          ValueError: for a name or a number of numbers that does not fit.
        """
        names = self.all_signals.names
        if self.signal_weights and len(self.signal_weights) != len(names):
            raise ValueError(
                f"{self.room}.signal_weights has {len(self.signal_weights)} numbers; give {len(names)}, one for each "
                f"of {', '.join(names)}"
            )

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weights [S] of the feedback losses."""
        return self.signal_weights or tuple(signal.weight for signal in self.all_signals.signals)

    @property
    def room(self) -> str:
        """The section of a run's config that holds the fields, for messages."""
        return "agents"

    @property
    def table_dims(self) -> dict[str, int]:
        """Width of the embedding rows of each table."""
        return {"author": self.author_dim, "id": self.id_dim, "tag": self.tag_dim, "user": self.user_dim}
