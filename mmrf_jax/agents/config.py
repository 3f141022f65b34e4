"""What defines the agents: signals, sizes and the numbers of learning."""

from __future__ import annotations

import dataclasses

from mmrf_jax import fields
from mmrf_jax.encoders.config import EncoderConfig
from mmrf_jax.fields import field
from mmrf_jax.signals import AGENT_SIGNALS, SIGNALS, signal_index

WATCH_REWARDS = ("seconds", "long_view", "sum")
SAMPLING = ("uniform", "score", "uncertainty")
ABLATIONS = ("none", "co", "da", "ns")
COMMUNICATION = ("attention", "signal", "none")


@dataclasses.dataclass(frozen=True)
class AgentConfig(EncoderConfig):
    """Static configuration of the agents; hashable, so it can be closed over by jitted functions.

    The fields are explained where they are declared. `ablation` is `none`; `co`: no collaboration (no attention, no
    auxiliary scores to the main agent); `da`: nothing is learned from videos that were not shown; `ns`: they get a
    constant negative reward. `watch_reward` is `seconds`; or, where a few long plays would decide all, `long_view`: 1
    for 18 seconds or the whole video; or `sum`, of the normalised rewards of all signals that have an agent by default,
    for an agent that stands for all. `communication` is how actors learn from each other: `attention`; `signal`: all
    get one vector made of the shared state, and the main one no auxiliary scores; `none`. `ablation=co` makes it none.

    Raises:
      ValueError: for values that cannot be, alone or together.
    """

    signals: tuple[str, ...] = field(
        AGENT_SIGNALS, "of the agents; the last is the main one, whose scores decide the exposure", among=SIGNALS
    )
    ablation: str = field(
        "none",
        "or co: without collaboration; da: without videos not shown; ns: those get -1",
        among=ABLATIONS,
    )
    non_impressions: float = field(
        0.25,
        "rho, the share of the unseen candidates that the feedback model labels, and their weight beside impressions",
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
        "of the feedback model's predictions in Q, beside the critics'; 2/3 counts each twin once; none for da, ns",
        fields.SHARE,
    )
    optimism: float = field(
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
    main_weight: float = field(
        0.1, "lambda, weight of the main agent's value in an auxiliary agent's objective", fields.NOT_NEGATIVE
    )
    watch_reward: str = field("seconds", "of the watch-time agent", among=WATCH_REWARDS)
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
        """Slates of unseen videos labelled at each request of C candidates: floor(rho (C - K) / K), or none."""
        if self.ablation == "da" or not self.slate:
            return 0
        return int(self.non_impressions * (candidates - self.slate) / self.slate)

    @property
    def uses_model(self) -> bool:
        """Whether values are also the feedback model's; a constant reward, or none, needs no model of feedback."""
        return self.ablation in ("none", "co") and self.model_weight > 0.0

    @property
    def rewards_differ(self) -> bool:
        """Whether rewards of videos that were not shown are more, or less, than their expected feedback."""
        return self.ablation == "ns" or (self.ablation != "da" and self.optimism != 0.0)

    @property
    def collaborates(self) -> bool:
        """Whether agents learn from each other's states and scores."""
        return self.communication == "attention" and self.ablation != "co" and self.num_actors > 1

    @property
    def num_agents(self) -> int:
        return len(self.signals)

    @property
    def num_actors(self) -> int:
        return 1 if self.one_actor else self.num_agents

    @property
    def reward_terms(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """What each agent's reward adds up: positions of signals, and signs; a hate counts -1."""
        watched = {"seconds": ("watch_time",), "long_view": ("long_view",), "sum": AGENT_SIGNALS}
        term = lambda s: (signal_index(s), -1.0 if s == "hate" else 1.0)
        summed = lambda s: watched[self.watch_reward] if s == "watch_time" else (s,)
        return tuple(tuple(map(term, summed(s))) for s in self.signals)
