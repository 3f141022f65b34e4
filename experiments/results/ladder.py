"""The oracle ladder: a trained run, served with one learned part at a time replaced by the world's truth.

  python -m experiments.results.ladder --workdir=runs/world
  python -m experiments.results.ladder --workdir=runs/world --sessions=20000 --explored=runs/planning_logs

Trains the main job in the folder if it is empty (a minute or two), else loads the run there, and serves the same users
by each row, which takes about as long. The rows:

- `run`: the main actor, as in the A/B test. `values`: the critics' q_N(s, c) = r + γ p (1 − p) l_c V, ranked directly.
- `true feedback`, `true staying`, `true values`, `exact slate`: q_N with r; with p and l_c; with V; or a slate
  searched to maximise Σ r + γ p(w) V instead of its first order. `all true`: all four at once.
- `explored`: the run of --explored, such as one that learned from logs of the planning oracle, where no exploration is
  missing (`mmrf collect --policy=oracle_planning`, `mmrf train --config.data.dir=…`).
- the oracles: the next video's truth; what a platform can observe, with videos known from their features alone, from as
  many sessions as the job has (`observable_videos.learn_from_sessions`), or from unlimited logs; and the planning
  oracle of README.md.

Predictions are those of the target critics; the feedback model's share in the values of training is not added. The
true V is a regression of the run's discounted returns on the hidden state (patience, activity, susceptibility,
position, the best candidates); its R² is printed.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from experiments import world
from mmrf_jax import ops, types
from mmrf_jax.agents.mmrf import acting, losses, policy
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.environment import Environment
from mmrf_jax.envs.short_video import leaving, observable, observable_videos, reference_policies, response
from mmrf_jax.envs.short_video.truth import truth_of as affinities
from mmrf_jax.io import tables
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import arms as arms_of
from mmrf_jax.training import configs, restore, run_folder, startup, steps, train

#: The parts that a row replaces by the truth; `actor` serves the actor's scores instead of values.
PARTS = ("actor", "feedback", "staying", "values", "exact")
ROWS = {
    "run": ("actor",),
    "values": (),
    "true feedback": ("feedback",),
    "true staying": ("staying",),
    "true values": ("values",),
    "exact slate": ("exact",),
    "all true": ("feedback", "staying", "values", "exact"),
}
_GRID = 17  # slopes of staying among which the exact slate is searched
_SLOTS = 512
_LOG_USERS = 400_000_000  # first user whose sessions teach the observable oracle about the videos


@struct.dataclass
class Replaced(rankers.Ranker):
    """A run's policy with parts replaced by the truth; it sees the simulator's hidden state."""

    def scores(self, env_params: Any, state: Any, carry: Any, request: types.Request) -> chex.Array:
        """Return the scores [B, C]."""
        return self.score(self.params, carry, request, env_params, state)


def parts_of(config: AgentConfig, params: Any, memory: Any, request: types.Request) -> dict[str, chex.Array]:
    """Return what the run's networks say: "actor", "reward" and "effect" [B, C], "logit" and "value" [B]."""
    run = params["run"]
    z, items = policy.user_state(config, run, memory, request), run["encodings"][request.candidates]
    if config.own_critics:
        items = jnp.swapaxes(items, 1, 2)
    user = (z, memory.mean())
    out = acting.apply_critics(config, params["critics"], run["actor"], user, items)
    logit, effect = out.continue_logit, out.continue_item_logit
    if config.own_critics:
        logit, effect = logit[:, -1], effect[:, -1]
    return {
        "actor": acting.apply_actors(config, run["actor"], run["critics"], *user, items).scores[:, -1],
        "reward": losses.video_rewards(config.all_signals, out, params["scale"], config.reward_terms)[:, -1],
        "logit": logit,
        "effect": effect,
        "value": out.value.min(axis=-2)[:, -1],
    }


def truth_of(config: AgentConfig, params: Any, world, state) -> dict[str, chex.Array]:
    """Return the truth of the same parts but the actor, in their units."""
    truth = affinities(world, state, state.candidates)
    nothing = jnp.zeros((len(state.user_id), 1))
    return {
        "reward": response.expected_watch(world, truth) / params["scale"][-1],
        "logit": leaving.continue_logit(world, state, nothing),
        "effect": world.behaviour.continue_enjoyment / config.slate * truth.enjoyment,
        "value": features_of(config, world, state) @ params["beta"],
    }


def features_of(config: AgentConfig, world, state) -> chex.Array:
    """Return the features [B, 7] of the hidden state that the true V is a regression on."""
    t, truth = state.traits, affinities(world, state, state.candidates)
    watch = response.expected_watch(world, truth)
    best = ops.top_k(watch + reference_policies.PLANNING_WEIGHT * truth.enjoyment, config.slate)
    means = [jnp.take_along_axis(x, best, axis=1).mean(axis=1) for x in (watch / 100.0, truth.enjoyment)]
    position = state.position.astype(jnp.float32) / 10.0
    return jnp.stack([jnp.ones_like(position), t.patience, t.activity, t.susceptibility, position, *means], axis=-1)


def scores_of(use: chex.Array, learned: dict, truth: dict, slate: int, discount: float) -> chex.Array:
    """Compute the scores [B, C] of a row.

    Args:
      use: [5] bool, in the order of `PARTS`.
      learned: of `parts_of`.
      truth: of `truth_of`.
      slate: K.
      discount: gamma.
    """
    chosen = dict(zip(PARTS, use, strict=True))

    def pick(name, part):
        return jnp.where(chosen[part], truth[name], learned[name])

    reward, value = pick("reward", "feedback"), pick("value", "values")
    logit, effect = pick("logit", "staying"), pick("effect", "staying")

    def exposed(x, scores):
        return jnp.take_along_axis(x, ops.top_k(scores, slate), axis=1).sum(axis=1)

    stay = jax.nn.sigmoid(logit + exposed(effect, learned["actor"]))
    first_order = reward + (discount * stay * (1.0 - stay) * value)[:, None] * effect
    # Of the slates that are best for one slope of p(w) in the sum of effects, take the one with the highest worth.
    slopes = jnp.linspace(0.0, 0.25, _GRID)

    def worth(slope):
        scores = reward + (discount * slope * value)[:, None] * effect
        return exposed(reward, scores) + discount * value * jax.nn.sigmoid(logit + exposed(effect, scores))

    best = slopes[jnp.argmax(jax.lax.map(worth, slopes), axis=0)]
    exact = reward + (discount * best * value)[:, None] * effect
    return jnp.where(chosen["actor"], learned["actor"], jnp.where(chosen["exact"], exact, first_order))


@functools.cache
def _functions(config: AgentConfig, init, observe):
    """Return init, score and observe of `Replaced`, the same objects for all rows of a run: one compiled program."""

    def score(params, memory, request, world, state):
        learned, truth = parts_of(config, params, memory, request), truth_of(config, params, world, state)
        return scores_of(params["use"], learned, truth, config.slate, config.discount)

    def start(params, request, history):
        return init(params["run"], request, history)

    def follow(params, carry, request, shown):
        return observe(params["run"], carry, request, shown)

    return start, score, follow


def replaced(state, items: types.Items, config: AgentConfig, beta: np.ndarray, row: str) -> Replaced:
    """Return a row of `ROWS` as a policy."""
    served = policy.make_actor_ranker(state, items, config)
    params = {
        "run": served.params,
        "critics": state.target,
        "scale": state.reward_scale,
        "beta": jnp.asarray(beta, jnp.float32),
        "use": np.array([part in ROWS[row] for part in PARTS]),
    }
    start, score, observe = _functions(config, served.start, served.observe)
    return Replaced(params=params, start=start, score=score, observe=observe)


def fit_values(sim: Environment, state, config: AgentConfig, key: types.Key, users: int) -> tuple[np.ndarray, float]:
    """Regress the run's discounted normalised returns on `features_of`: coefficients [7], and R².

    Args:
      sim: the world.
      state: of the agents.
      config: of the agents.
      key: of the sessions.
      users: number of sessions.
    """
    served, scale = policy.make_actor_ranker(state, sim.items, config), state.reward_scale[-1]
    watch, steps_ = config.all_signals.index(config.agent_signals[-1]), sim.default_params.config.max_requests

    @jax.jit
    def unroll(params, served):
        request, history, world_state = sim.reset_env(key, params, jnp.arange(users, dtype=jnp.int32), jnp.int32(0))

        def body(carried, _):
            world_state, request, memory, live = carried
            x = features_of(config, params, world_state)
            slate = ops.top_k(served.scores(params, world_state, memory, request), config.slate)
            result, world_state = sim.step_env(key, world_state, slate, params)
            reward = result.exposure.feedback[..., watch].sum(axis=1) / scale
            memory = served.next_carry(memory, request, result.exposure)
            after = live & ~result.terminated
            return (world_state, result.request, memory, after), (x, reward, live)

        start = (world_state, request, served.initial_carry(request, history), jnp.ones(users, bool))
        return jax.lax.scan(body, start, None, length=steps_)[1]

    x, reward, live = map(np.asarray, unroll(sim.default_params, served))
    returns, total = np.zeros_like(reward), np.zeros(users)
    for t in reversed(range(steps_)):
        total = live[t] * (reward[t] + config.discount * total)
        returns[t] = total
    x, returns = x[live], returns[live]
    beta = np.linalg.lstsq(x, returns, rcond=None)[0]
    return beta, float(1.0 - np.var(returns - x @ beta) / np.var(returns))


def climb(workdir: Path, sessions: int, explored: Path | None) -> str:
    """Return the rows of a run as a Markdown table: mean watch time and depth of each, paired with the run's."""
    config = configs.run_of(run_folder.read_config(workdir))
    partitioner = Partitioner()
    source = restore.source_of(config, partitioner, workdir=workdir)
    plan = steps.plan_of(config, source.spec.signals)
    if config.method not in ("mmrf", "massa") or plan.agents.reward or plan.agents.agent_signals[-1] != "watch_time":
        raise ValueError(f"{workdir} has no critics of watch time; use a run of mmrf or massa without agents.reward")
    sim, agents = source.sim, restore.load_state(config, source, workdir, partitioner).agents
    assert sim is not None
    sim, key = sim.with_items(source.items), types.make_key(config.seed)
    beta, fit = fit_values(sim, agents, plan.agents, jax.random.fold_in(key, 1), min(sessions, 2_048))

    @functools.partial(jax.jit, static_argnames="size")
    def serve(arm, sim, size):
        slots = min(_SLOTS, size)
        return rollout.rollout(sim, arm, key, 0, 0, num_users=size, slots=slots)[0]

    seen = config.alternation.rounds * config.collect.sessions
    logs = observable_videos.learn_from_sessions(sim, jax.random.fold_in(key, 2), _LOG_USERS, seen)
    by_features, by_logs = (
        observable.policy(observable_videos.believed_params(sim.default_params, belief))
        for belief in (observable_videos.video_prior(sim.default_params), logs)
    )
    arms: dict[str, rankers.AnyRanker] = {row: replaced(agents, sim.items, plan.agents, beta, row) for row in ROWS}
    if explored is not None:
        arms["explored"] = arms_of.policy_of(str(explored), source, partitioner)
    arms |= {
        "oracle_myopic": source.policies["oracle_myopic"],
        "oracle_observable, videos by features": by_features,
        f"oracle_observable, videos by {seen:,} sessions": by_logs,
        "oracle_observable": source.policies["oracle_observable"],
        "oracle_planning": source.policies["oracle_planning"],
    }
    names = list(rollout.user_metrics(sim.signals))
    served = {name: np.asarray(serve(arm, sim, sessions), np.float64) for name, arm in arms.items()}
    watch = {name: x[:, names.index("watch_time")] for name, x in served.items()}
    lines = []
    for name, x in served.items():
        diff = watch[name] - watch["run"]
        change, error = 100.0 * diff.mean() / watch["run"].mean(), 196.0 * diff.std() / len(diff) ** 0.5
        half = error / watch["run"].mean()
        text = "" if name == "run" else f"{change:+.1f} % [{change - half:+.1f}, {change + half:+.1f}]"
        lines.append([name, f"{watch[name].mean():,.0f}", text, f"{x[:, names.index('depth')].mean():.1f}"])
    header = ["row", "watch time, s per session", "difference to run", "depth, videos per session"]
    return f"{sessions:,} sessions in each row; R² of the true values {fit:.2f}\n\n{tables.markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path, help="run folder; trained if it is empty")
    parser.add_argument("--sessions", type=int, default=20_000, help="of each row")
    parser.add_argument("--quick", action="store_true", help="train the tiny form of the job")
    parser.add_argument("--explored", type=Path, help="run folder of another run to serve")
    given = parser.parse_args()
    startup.start_jax()
    if not (given.workdir / "learned.json").exists():
        values = configs.resolve_config(world.get_config().to_dict(), {"quick": given.quick})
        train.train_run(configs.run_of(values), given.workdir, brief=True)
    print(climb(given.workdir, given.sessions, given.explored))


if __name__ == "__main__":
    main()
