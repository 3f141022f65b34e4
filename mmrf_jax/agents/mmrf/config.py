"""Configuration of the agents: signals, sizes and the hyperparameters of learning."""

from __future__ import annotations

import dataclasses

from mmrf_jax import fields
from mmrf_jax.fields import field
from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.signals import parse_reward

SUM = "sum_of_signals"  # a reward: of all agents
SAMPLING = ("uniform", "score", "uncertainty")
ABLATIONS = ("none", "no_collaboration", "no_augmentation", "constant_negative")
COMMUNICATION = ("attention", "shared_latent", "none")
CRITICS = ("shared", "own")


@dataclasses.dataclass(frozen=True)
class AgentConfig(EncoderConfig):
    """Static configuration of the agents; hashable, so jitted functions can close over it.

    Fields are documented where they are declared. Ablations (the paper's short names in parentheses):
    `no_collaboration` (co) removes attention and the auxiliary scores of the main agent; `no_augmentation` (da) removes
    the counterfactual slates; `constant_negative` (ns) gives them a constant negative reward.

    An agent's reward is its signal, or minus it where more is worse. `reward` changes that of the main agent to a
    weighted sum of signals, each divided by its standard deviation in the first log, such as `long_view`, for data
    where a few long plays would dominate, or `watch_time + 3*like - 5*hate`. `sum_of_signals` is the sum of all agents'
    rewards, for a single agent. `like: like + comment; watch_time: watch_time - hate` names the agents.
    Actors communicate by `attention`, by one `shared_latent` vector without auxiliary scores, or not at all (`none`).

    With `critics=own` an agent sees only the signals that it is rewarded by: in its histories, its encoder and its
    critic, which predicts staying too. It knows of other signals what the agents communicate, which then enters its
    critic as well. The feedback model sees every signal, so there is none.

    Raises:
      ValueError: if values are invalid, alone or in combination.
    """

    signals: tuple[str, ...] = field(
        (),
        "of the agents; the last is the main one, whose scores decide the exposure; empty: those that the log's schema "
        "names",
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
        "how unseen candidates to label are drawn: uniformly, or by Plackett–Luce on the standardised scores of the "
        "main agent or uncertainties of the feedback model about its signal",
        among=SAMPLING,
    )
    model_weight: float = field(
        2.0 / 3.0,
        "weight of the feedback model's predictions in Q; the critics' have the rest; 2/3 counts each twin once",
        fields.SHARE,
    )
    uncertainty_bonus: float = field(
        0.0,
        "beta; a simulated reward r becomes r + beta * u * |r| at relative uncertainty u; negative: pessimism",
        fields.FINITE,
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
        "whether actors add a learned residual to their critics' values; else they learn scores from scratch, which "
        "is better in simulators",
    )
    main_objective_weight: float = field(
        0.1, "lambda, weight of the main agent's value in an auxiliary agent's objective", fields.NOT_NEGATIVE
    )
    reward: str = field(
        "",
        "reward of the main agent, such as 'watch_time + 3*like - 5*hate', in standard deviations of each signal; of "
        "others as 'like: like + comment; …'; empty: each agent's own signal",
    )
    temperature: float = field(
        0.25, "tau of the relaxed exposure, in units of the spread of a critic over candidates", fields.RATE
    )
    discount: float = field(
        0.95,
        "gamma of a request; 0 if logs do not say why sessions end: then only the feedback on the slate counts",
        fields.SHARE,
    )
    polyak: float = field(0.05, "rate at which target networks follow", fields.PART)
    critics: str = field(
        "shared",
        "shared: one encoder and critic that predict every signal, for all agents; own: one for each agent, which sees "
        "only the signals that the agent is rewarded by",
        among=CRITICS,
    )
    actor_learning_rate: float = field(
        3e-3, "of Adam for the actors; learning_rate is that of encoder and critics", fields.NOT_NEGATIVE
    )
    communication: str = field("attention", "set by the method", among=COMMUNICATION, internal=True)
    one_actor: bool = field(
        False, "whether the main agent acts alone, whatever the critics' signals; set by the method", internal=True
    )

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.signals)) != len(self.signals):
            raise ValueError(f"agents.signals={self.signals} must name each signal once")
        if self.agent_dim % self.heads:
            raise ValueError(f"agents.agent_dim={self.agent_dim} is not divisible by agents.heads={self.heads}")
        if self.own_critics:
            self._check_own_critics()

    def _check_own_critics(self) -> None:
        labels = self.ablation != "no_augmentation" and self.counterfactual_weight > 0.0
        if labels or self.values_use_model or self.rewards_differ:
            raise ValueError(
                "agents.critics=own cannot use the feedback model, which sees every signal; set "
                "agents.ablation=no_augmentation, or agents.counterfactual_weight=0 and agents.model_weight=0"
            )
        for name, needed in (
            ("residual_actor", False),
            ("score_hidden", None),
            ("compute_dtype", "float32"),
            ("encoder", "memory"),
        ):
            if getattr(self, name) != needed:
                raise ValueError(f"agents.critics=own needs agents.{name}={needed}, not {getattr(self, name)}")

    def check_signals(self) -> None:
        super().check_signals()
        for name in self.signals:
            if name not in self.all_signals.names:
                among = ", ".join(self.all_signals.names)
                raise ValueError(f"unknown agents.signals={name!r}; choose among {among}")
        for name in self._rewards:
            if name not in self.agent_signals:
                among = ", ".join(self.agent_signals)
                raise ValueError(f"agents.reward={self.reward!r} names the agent {name!r}; choose among {among}")
        try:
            _ = self.reward_terms
        except ValueError as error:
            raise ValueError(f"agents.reward={self.reward!r}: {error}") from error
        if self.own_critics:
            for i, name in enumerate(self.all_signals.names):
                if sum(signals[i] for signals in self.own_signals) > 1.0:
                    raise ValueError(
                        f"agents.critics=own, but several agents are rewarded by {name!r}; change agents.reward"
                    )

    def simulated_slates(self, candidates: int) -> int:
        """Return the number of counterfactual slates per request of C candidates: floor(rho (C - K) / K), or 0."""
        if self.ablation == "no_augmentation" or not self.slate:
            return 0
        return int(self.counterfactual_weight * (candidates - self.slate) / self.slate)

    @property
    def values_use_model(self) -> bool:
        """Whether values also use the feedback model; a constant reward, or none, needs no feedback model."""
        return self.ablation in ("none", "no_collaboration") and self.model_weight > 0.0

    @property
    def own_critics(self) -> bool:
        """Whether each agent has an encoder and a critic that see its own signals alone."""
        return self.critics == "own"

    @property
    def own_signals(self) -> tuple[tuple[float, ...], ...]:
        """For each agent [N], 1 for the signals [S] of its reward and 0 for others."""
        names = range(len(self.all_signals))
        return tuple(tuple(float(s in dict(terms)) for s in names) for terms in self.reward_terms)

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
        return len(self.agent_signals)

    @property
    def agent_signals(self) -> tuple[str, ...]:
        """Signals [N] of the agents, the main one last."""
        return self.signals or self.all_signals.agents

    @property
    def num_actors(self) -> int:
        return 1 if self.one_actor else self.num_agents

    @property
    def reward_terms(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """The terms of each agent's reward: positions of signals, and their weights.

        Raises:
          ValueError: for a reward that is no weighted sum of signals.
        """
        signals, given = self.all_signals, self._rewards

        def terms(agent):
            if agent not in given:
                return {agent: float(signals.sign(agent))}
            if given[agent] == SUM:
                return {name: float(signals.sign(name)) for name in signals.agents}
            return parse_reward(given[agent], signals.names)

        return tuple(
            tuple((signals.index(name), weight) for name, weight in terms(agent).items())
            for agent in self.agent_signals
        )

    @property
    def _rewards(self) -> dict[str, str]:
        """The rewards that `reward` sets, by agent; one without a name is the main agent's."""
        found = {}
        for part in filter(None, map(str.strip, self.reward.split(";"))):
            name, colon, text = part.rpartition(":")
            found[name.strip() if colon else self.agent_signals[-1]] = text.strip()
        return found
