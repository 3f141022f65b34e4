"""What defines the agents: signals, sizes and the numbers of learning."""

from __future__ import annotations

import dataclasses

from mmrf_jax import types

ABLATIONS = ("none", "co")


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Static configuration of the agents; hashable, so it can be closed over by jitted functions.

    Attributes:
      signals: the signal of each agent; the last is the main one, whose scores decide the exposure.
      ablation: `none`, or `co`: no collaboration (no attention, no auxiliary scores to the main agent).
      main_weight: lambda, the weight of the main agent's value in an auxiliary agent's objective.
      watch_reward: of the watch-time agent, `seconds`; or, where a few long plays would decide all, `long_view`: 1
        for 18 seconds or the whole video.
      temperature: tau of the relaxed exposure, in units of the spread of a critic over candidates.
      discount: gamma of a request. polyak: rate at which target networks follow.
      learning_rate, actor_learning_rate: of Adam, for encoder and critics, and for actors.
      decay_updates: updates over which they fall to a twentieth along a cosine; 0 for never.
      table_learning_rate: of row-wise Adagrad.
      optimizer: `adamw`, or `sgd` for checks of invariance.
      signal_weights: of the feedback losses, SIGNALS order; rare signals weigh more, or they leave no trace.
      dropout: on looked-up embedding rows and on the user state, in training only.
    """

    signals: tuple[str, ...] = types.AGENT_SIGNALS
    ablation: str = "none"
    slate: int = 6
    dim: int = 32  # D of an item encoding
    id_dim: int = 8
    author_dim: int = 8
    tag_dim: int = 8
    user_dim: int = 8
    feedback_dim: int = 8
    decays: tuple[float, ...] = (0.98, 0.8)  # of the user memory, for each exposure
    state_dim: int = 64
    agent_dim: int = 32
    heads: int = 4
    main_weight: float = 0.1
    watch_reward: str = "seconds"
    temperature: float = 0.25
    discount: float = 0.95
    polyak: float = 0.02
    learning_rate: float = 1.5e-3
    actor_learning_rate: float = 3e-3
    decay_updates: int = 0
    weight_decay: float = 1e-4
    table_learning_rate: float = 0.05
    dropout: float = 0.0
    optimizer: str = "adamw"
    signal_weights: tuple[float, ...] = (1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0)

    def __post_init__(self):
        for name in self.signals:
            types.signal_index(name)
        if len(set(self.signals)) != len(self.signals) or not self.signals:
            raise ValueError(f"agents.signals={self.signals} must name at least one signal, each once")
        if self.watch_reward not in ("seconds", "long_view"):
            raise ValueError(f"unknown agents.watch_reward={self.watch_reward!r}; use seconds or long_view")
        if self.ablation not in ABLATIONS:
            raise ValueError(f"unknown ablation {self.ablation!r}; choose among {', '.join(ABLATIONS)}")
        if self.dim <= self.id_dim + 1:
            raise ValueError(
                f"agents.dim={self.dim} leaves no room beside agents.id_dim={self.id_dim}; use a larger dim"
            )
        if self.agent_dim % self.heads:
            raise ValueError(f"agents.agent_dim={self.agent_dim} is not divisible by agents.heads={self.heads}")

    @property
    def num_agents(self) -> int:
        return len(self.signals)

    @property
    def reward_indices(self) -> tuple[int, ...]:
        """Position of each agent's reward in a feedback array."""
        watched = "watch_time" if self.watch_reward == "seconds" else self.watch_reward
        return tuple(types.signal_index(watched if s == "watch_time" else s) for s in self.signals)

    @property
    def signs(self) -> tuple[float, ...]:
        """Sign of each agent's reward: a hate counts -1 (method.md, section 1)."""
        return tuple(-1.0 if s == "hate" else 1.0 for s in self.signals)
