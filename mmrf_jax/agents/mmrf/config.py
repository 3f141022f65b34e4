"""Configuration of the agents: signals, sizes and the hyperparameters of learning."""

from __future__ import annotations

import dataclasses

from mmrf_jax import fields
from mmrf_jax.fields import field
from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.signals import AGENT_SIGNALS, SIGNALS, signal_index

REWARDS = ("seconds", "long_view", "sum_of_signals")
SAMPLING = ("uniform", "score", "uncertainty")
ABLATIONS = ("none", "no_collaboration", "no_augmentation", "constant_negative")
COMMUNICATION = ("attention", "shared_latent", "none")


@dataclasses.dataclass(frozen=True)
class AgentConfig(EncoderConfig):
    """Static configuration of the agents; hashable, so jitted functions can close over it.

    Fields are documented where they are declared. Ablations (the paper's short names in parentheses):
    `no_collaboration` (co) removes attention and the auxiliary scores of the main agent; `no_augmentation` (da) removes
    the counterfactual slates; `constant_negative` (ns) gives them a constant negative reward. The watch-time agent's
    `reward` is `seconds`; `long_view`, 1 for 18 seconds or the whole video, for data where a few long plays would
    dominate; or `sum_of_signals`, the sum of all agents' normalised rewards, for a single agent.
    Actors communicate by `attention`, by one `shared_latent` vector without auxiliary scores, or not at all (`none`).

    Raises:
      ValueError: if values are invalid, alone or in combination.
    """

    signals: tuple[str, ...] = field(
        AGENT_SIGNALS, "of the agents; the last is the main one, whose scores decide the exposure", among=SIGNALS
    )
    ablation: str = field(
        "none",
        "no_collaboration (co in the paper): no attention between agents; no_augmentation (da): no counterfactual "
        "slates; constant_negative (ns): counterfactual slates get a reward of -1",
        among=ABLATIONS,
    )
    counterfactual_weight: float = field(
        0.25,
        "rho, the share of the unseen candidates that the feedback model labels, and their weight",
        fields.SHARE,
    )
    sampling: str = field(
        "uniform",
        "which unseen candidates are labelled; or those with a higher score of the main agent, or more uncertainty of "
        "the feedback model about its signal, as Plackett–Luce on standardised values",
        among=SAMPLING,
    )
    model_weight: float = field(
        2.0 / 3.0,
        "of the feedback model's predictions in Q, the rest the critics'; 2/3 counts each twin once",
        fields.SHARE,
    )
    uncertainty_bonus: float = field(
        0.0, "beta, by how many times its uncertainty a simulated reward is widened; negative: pessimism", fields.FINITE
    )
    agent_dim: int = field(32, "width of an agent's state", fields.WIDTH, internal=True)
    heads: int = field(4, "of the attention between agents", fields.WIDTH, internal=True)
    score_hidden: int | None = field(
        None,
        "units of an MLP over user vector and encoding whose score is added to their product; None for products alone, "
        "which are far cheaper (experiments/mlp_heads.py)",
        fields.WIDTH,
    )
    residual_actor: bool = field(
        False,
        "whether actors add a learned residual to their critics' values; else they learn scores from nothing, as the "
        "policies of simulators do best",
    )
    main_objective_weight: float = field(
        0.1, "lambda, weight of the main agent's value in an auxiliary agent's objective", fields.NOT_NEGATIVE
    )
    reward: str = field("seconds", "of the watch-time agent", among=REWARDS)
    temperature: float = field(
        0.25, "tau of the relaxed exposure, in units of the spread of a critic over candidates", fields.RATE
    )
    discount: float = field(
        0.95,
        "gamma of a request; 0 where logs do not tell why sessions end: only the feedback of the slate counts",
        fields.SHARE,
    )
    polyak: float = field(0.05, "rate at which target networks follow", fields.PART)
    actor_learning_rate: float = field(
        3e-3, "of Adam, for actors; learning_rate is that of encoder and critics", fields.NOT_NEGATIVE
    )
    communication: str = field("attention", "set by the method", among=COMMUNICATION, internal=True)
    one_actor: bool = field(
        False, "whether the main agent acts alone, whatever the critics' signals; set by the method", internal=True
    )

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.signals)) != len(self.signals) or not self.signals:
            raise ValueError(f"agents.signals={self.signals} must name at least one signal, each once")
        if self.agent_dim % self.heads:
            raise ValueError(f"agents.agent_dim={self.agent_dim} is not divisible by agents.heads={self.heads}")

    def simulated_slates(self, candidates: int) -> int:
        """Return the number of counterfactual slates per request of C candidates: floor(rho (C - K) / K), or 0."""
        if self.ablation == "no_augmentation" or not self.slate:
            return 0
        return int(self.counterfactual_weight * (candidates - self.slate) / self.slate)

    @property
    def uses_model(self) -> bool:
        """Whether values also use the feedback model; a constant reward, or none, needs no feedback model."""
        return self.ablation in ("none", "no_collaboration") and self.model_weight > 0.0

    @property
    def rewards_differ(self) -> bool:
        """Whether rewards of unshown videos differ from their expected feedback."""
        return self.ablation == "constant_negative" or (
            self.ablation != "no_augmentation" and self.uncertainty_bonus != 0.0
        )

    @property
    def collaborates(self) -> bool:
        """Whether agents use each other's states and scores."""
        return self.communication == "attention" and self.ablation != "no_collaboration" and self.num_actors > 1

    @property
    def num_agents(self) -> int:
        return len(self.signals)

    @property
    def num_actors(self) -> int:
        return 1 if self.one_actor else self.num_agents

    @property
    def reward_terms(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """The terms of each agent's reward: positions of signals, and signs; a hate counts -1."""
        watched = {"seconds": ("watch_time",), "long_view": ("long_view",), "sum_of_signals": AGENT_SIGNALS}

        def term(s):
            return (signal_index(s), -1.0 if s == "hate" else 1.0)

        def summed(s):
            return watched[self.reward] if s == "watch_time" else (s,)

        return tuple(tuple(map(term, summed(s))) for s in self.signals)
