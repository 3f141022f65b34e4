"""What defines the agents: signals, sizes and the numbers of learning."""

from __future__ import annotations

import dataclasses

from mmrf_jax import types
from mmrf_jax.encoders.config import EncoderConfig

WATCH_REWARDS = ("seconds", "long_view", "sum")
SAMPLING = ("uniform", "score", "uncertainty")
ABLATIONS = ("none", "co", "da", "ns")
COMMUNICATION = ("attention", "signal", "none")


@dataclasses.dataclass(frozen=True)
class AgentConfig(EncoderConfig):
    """Static configuration of the agents; hashable, so it can be closed over by jitted functions.

    Attributes:
      signals: the signal of each agent; the last is the main one, whose scores decide the exposure.
      ablation: `none`; `co`: no collaboration (no attention, no auxiliary scores to the main agent); `da`: nothing is
        learned from videos that were not shown; `ns`: they get a constant negative reward.
      non_impressions: rho, the share of the unseen candidates that is labelled by the feedback model and learned from;
        also their weight beside the impressions, together.
      sampling: which unseen candidates are labelled: `uniform`, or the likelier the higher their `score` by the main
        agent or their `uncertainty`, that of the feedback model about the main agent's signal; both standardised, as
        Plackett–Luce.
      model_weight: of the feedback model's r̂ and p̂_stay in Q, beside the critics' own; 2/3 counts each twin once.
        Without effect for `da` and `ns`, which have no model of feedback.
      optimism: beta, by how many times its uncertainty a simulated reward is widened; negative for pessimism.
      score_hidden: units of an MLP over user vector and encoding, whose score of each candidate is added to their
        product; None for products alone, which are far cheaper (experiments/mlp_heads.py).
      main_weight: lambda, the weight of the main agent's value in an auxiliary agent's objective.
      watch_reward: of the watch-time agent, `seconds`; or, where a few long plays would decide all, `long_view`: 1
        for 18 seconds or the whole video; or `sum`, of the normalised rewards of all signals that have an agent by
        default, for an agent that stands for all.
      temperature: tau of the relaxed exposure, in units of the spread of a critic over candidates.
      discount: gamma of a request. polyak: rate at which target networks follow.
      actor_learning_rate: of Adam, for actors; `learning_rate` is that of encoder and critics.
      communication: how actors learn from each other, set by the method: `attention`; `signal`: all get one vector
        made of the shared state, and the main one no auxiliary scores; `none`. `ablation=co` makes it none.
      one_actor: whether the main agent acts alone, whatever the critics' signals; set by the method.
    """

    signals: tuple[str, ...] = types.AGENT_SIGNALS
    ablation: str = "none"
    non_impressions: float = 0.25
    sampling: str = "uniform"
    model_weight: float = 2.0 / 3.0
    optimism: float = 0.0
    agent_dim: int = 32
    heads: int = 4
    score_hidden: int | None = None
    main_weight: float = 0.1
    watch_reward: str = "seconds"
    temperature: float = 0.25
    discount: float = 0.95
    polyak: float = 0.02
    actor_learning_rate: float = 3e-3
    communication: str = "attention"
    one_actor: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in self.signals:
            types.signal_index(name)
        if len(set(self.signals)) != len(self.signals) or not self.signals:
            raise ValueError(f"agents.signals={self.signals} must name at least one signal, each once")
        for name, choices in (("watch_reward", WATCH_REWARDS), ("sampling", SAMPLING)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"unknown agents.{name}={value!r}; choose among {', '.join(choices)}")
        if self.ablation not in ABLATIONS:
            raise ValueError(f"unknown ablation {self.ablation!r}; choose among {', '.join(ABLATIONS)}")
        if self.communication not in COMMUNICATION:
            raise ValueError(f"unknown communication {self.communication!r}; choose among {', '.join(COMMUNICATION)}")
        if not 0.0 <= self.non_impressions <= 1.0:
            raise ValueError(f"agents.non_impressions={self.non_impressions} is not a share; use a number in [0, 1]")
        if not 0.0 <= self.model_weight <= 1.0:
            raise ValueError(f"agents.model_weight={self.model_weight} is not a share; use a number in [0, 1]")
        if self.score_hidden is not None and self.score_hidden < 1:
            raise ValueError(f"agents.score_hidden={self.score_hidden} is no number of units; use 1 or more, or None")
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
        watched = {"seconds": ("watch_time",), "long_view": ("long_view",), "sum": types.AGENT_SIGNALS}
        term = lambda s: (types.signal_index(s), -1.0 if s == "hate" else 1.0)
        summed = lambda s: watched[self.watch_reward] if s == "watch_time" else (s,)
        return tuple(tuple(map(term, summed(s))) for s in self.signals)
