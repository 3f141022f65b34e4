"""The trainable rankers by name: how each is trained, served and scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import chex
import jax
from flax import linen as nn

from mmrf_jax import plugins, types
from mmrf_jax.agents import bc, deepfm, iql, ltr, massa, pareto, supervised, td3_bc, tscac, wide_deep
from mmrf_jax.agents.mmrf import acting, agent_state, encoding, networks, policy, training_step
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.envs import rankers
from mmrf_jax.models import representation


def _actor_scores(
    config: AgentConfig, state: agent_state.AgentState, encoded: representation.Encoded, items
) -> chex.Array:
    return acting.apply_actors(
        config, state.params["actor"], acting.critics_of(state, config), *encoded.user, items
    ).scores


def _actors(config: AgentConfig) -> tuple[str, ...]:
    return config.agent_signals[-config.num_actors :]


class Method(NamedTuple):
    """A trainable ranker, which `register_method` gives a name.

        algorithm = training_step.Algorithm(my_actor_loss)
        mmrf.register_method("mine", mmrf.Method(functools.partial(training_step.update, algorithm=algorithm)))

    Attributes:
      update: one gradient step.
      make_policy: (state, items, config[, temperature]) -> `envs.rankers.Ranker`.
      score: (config, state, Encoded, items [B, T+1, C, D]) -> [B, T+1, N, C].
      signals: config -> signals of the score columns; the last column is served.
      critic: the module of `state.params["critic"]`.
      configure: adapts a run's agent config to this method.
      uses_model: whether `update` takes a feedback model's output (`types.CounterfactualSlates`).
      has_feedback_heads: whether its critic is fitted to every signal.
      collects_on_policy: whether it collects the logs it learns from, in a closed loop; else the first policy keeps
        collecting.
    """

    update: agent_state.Update
    make_policy: Callable[..., rankers.Ranker] = policy.make_actor_ranker
    score: Callable[..., chex.Array] = _actor_scores
    signals: Callable[[AgentConfig], tuple[str, ...]] = _actors
    critic: Callable[[AgentConfig], nn.Module] = networks.Critic
    configure: Callable[[AgentConfig], AgentConfig] = lambda config: config
    uses_model: bool = False
    has_feedback_heads: bool = True
    collects_on_policy: bool = True


def _supervised(
    critic: Callable[[AgentConfig], nn.Module],
    rank: supervised.Rank = supervised.by_main_signal,
    only_main: bool = False,
    **fields,
) -> Method:
    """Build a method that ranks by predictions; its columns are the agents' signals."""
    update = functools.partial(supervised.update, critic=critic, only_main=only_main)
    make_policy = functools.partial(supervised.make_supervised_ranker, critic=critic, rank=rank)

    def score(config, state, encoded, items):
        raw = critic(config).apply(state.params["critic"], *encoded.user, items).feedback
        return supervised.scores(config, raw, rank(config, raw, state.reward_scale))

    return Method(update, make_policy, score, lambda config: config.agent_signals, critic, **fields)


_with = functools.partial(functools.partial, dataclasses.replace)


def _alone(config: AgentConfig, **changes) -> AgentConfig:
    """Return the config of the main agent alone."""
    return dataclasses.replace(config, signals=config.agent_signals[-1:], **changes)


_alone_and_free = functools.partial(_alone, residual_actor=False)  # as published, even if MMRF adds to critics

METHODS = {
    "mmrf": Method(training_step.update, uses_model=True),
    "bc": Method(bc.update, configure=_alone_and_free, has_feedback_heads=False, collects_on_policy=False),
    "wide_deep": _supervised(wide_deep.critic),
    "deepfm": _supervised(deepfm.critic),
    "pareto": Method(pareto.update, configure=_with(one_actor=True)),
    "tscac": Method(tscac.update, configure=_with(communication="none")),
    "massa": Method(massa.update, configure=_with(communication="shared_latent"), uses_model=True),
    "td3_bc": Method(td3_bc.update, configure=_alone_and_free),
    "iql": Method(iql.update, configure=_alone_and_free),
    "ltr": _supervised(networks.Critic, ltr.weighted_sum, collects_on_policy=False),
    # The main signal's prediction, without long-term value: what ranking for the session adds is the difference to it.
    "myopic": _supervised(networks.Critic, only_main=True, configure=_alone, has_feedback_heads=False),
}


_registry = plugins.Registry("method", METHODS)
module_of = _registry.module_of


def register_method(name: str, method: Method) -> None:
    """Make a method available as `config.method`; `mmrf_jax.testing.check_method` checks that it keeps the contract.

    Args:
      name: of the method.
      method: the method; see docs/own-method.md.

    Raises:
      ValueError: if another method has the name.
      TypeError: if it is no `Method`.

    Example:
      >>> from mmrf_jax.agents import td3_bc
      >>> register_method("my_td3_bc", Method(td3_bc.update))
      >>> get("my_td3_bc").signals(AgentConfig(signals=("like", "watch_time")))
      ('like', 'watch_time')
    """
    if not isinstance(method, Method):
        raise TypeError(f"method {name!r} is {method!r}; give a mmrf_jax.agents.registry.Method")
    _registry.register(name, method, plugins.caller())


def get(name: str, modules: Iterable[str] = ()) -> Method:
    """Return the method of a name.

    Args:
      name: of the method.
      modules: modules that may register it (`Run.plugins` of a config), imported if the name is unknown.

    Raises:
      ValueError: if the name is unknown.
    """
    return _registry.get(name, modules)


def configured(name: str, config: AgentConfig, modules: Iterable[str] = ()) -> AgentConfig:
    """Return the agent config of a method; `modules` as in `get`.

    Raises:
      ValueError: if the ablation removes something that the method does not have, or it has no own critics.
    """
    method = get(name, modules)
    if config.ablation != "none" and (
        not method.uses_model or (name != "mmrf" and config.ablation == "no_collaboration")
    ):
        raise ValueError(
            f"agents.ablation={config.ablation!r} takes away what method {name!r} does not have; leave it at 'none'"
        )
    if config.own_critics and not method.uses_model:
        raise ValueError(f"agents.critics='own' is for mmrf and massa, not for method {name!r}; leave it at 'shared'")
    return adapted(method, config)


def adapted(method: Method, config: AgentConfig) -> AgentConfig:
    """Return the agent config of a method; without a feedback model, nothing is learned from unshown videos."""
    config = config if method.uses_model else dataclasses.replace(config, ablation="no_augmentation")
    return method.configure(config)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def score_candidates(
    state: agent_state.AgentState, batch: types.SessionBatch, items: types.Items, config: AgentConfig, method: str
) -> chex.Array:
    """Score all candidates of a batch of segments, without dropout: [B, T+1, N, C]."""
    encoded = encoding.encode_batch(config, state.params["encoder"], state.tables, batch, items)
    candidates = encoding.encode_videos(
        config, state.params["encoder"], state.tables, items, batch.candidates, batch.date
    )
    return get(method).score(config, state, encoded, candidates)
