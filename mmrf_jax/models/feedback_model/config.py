"""Configuration of the feedback model: its sizes and the hyperparameters of its fit."""

from __future__ import annotations

import dataclasses

from mmrf_jax import fields
from mmrf_jax.fields import field
from mmrf_jax.models.encoder_config import EncoderConfig

TWINS = 2
LOSSES = ("likelihood", "mse")
DEBIAS = ("propensity",)


@dataclasses.dataclass(frozen=True)
class FeedbackConfig(EncoderConfig):
    """Static configuration of the feedback model.

    Dropout is applied in fitting and where uncertainty is measured, never in predictions.

    `twin_feature_dropout` is the fixed fraction of profile and feature entries that is hidden from each twin. One twin
    trusts them fully, the other less, so they diverge where a prediction relies on what hardly varied in the log. On
    videos unlike the shown ones, both twins err to the same side, and twins that differ only by randomness agree.
    """

    learning_rate: float = field(3e-3, "of Adam", fields.NOT_NEGATIVE)
    dropout: float = field(0.02, "rate for embedding rows and the user state", fields.DROPOUT)
    loss: str = field(
        "likelihood",
        "`likelihood`: Bernoulli, and quasi-Poisson for watch time; `mse`: the paper's squared errors",
        among=LOSSES,
    )
    debias: str | None = field(
        None,
        "correction of the fit for what the logging ranker chose to show; `propensity`: exposures weigh their inverse "
        "propensity, which is fitted too",
        among=DEBIAS,
    )
    imputed_weight: float | None = field(
        None,
        "weight of candidates that were not shown, as many as were shown, in the fit as videos without any feedback; "
        "None: they are not fitted",
        fields.RATE,
    )
    twin_feature_dropout: tuple[float, float] = field(
        (0.0, 0.0),
        "share of features hidden from each twin; (0.0, 0.25): uncertainty ranks errors better, but errors are larger",
        fields.DROPOUT,
    )
    exposures: int = field(
        1, "kinds of exposure, each calibrated apart; 2: the ranker's, and at random", "[1, 2]", internal=True
    )
    num_mc_dropout_samples: int = field(
        1, "dropout masks that the uncertainty of a video is averaged over", fields.COUNT
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.twin_feature_dropout) != TWINS:
            raise ValueError(
                f"feedback.twin_feature_dropout={self.twin_feature_dropout} must be two shares in [0, 1), one for each "
                "twin"
            )

    @property
    def room(self) -> str:
        return "feedback"
