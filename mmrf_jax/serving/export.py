"""Export of a trained run to an artefact: the ranker and the feedback model as functions of arrays.

Functions for a server, with the letters of `types` and D of `models.encoders`; all dictionaries contain plain arrays:

    encode(weights, video)                        -> encodings [m, D] of m videos, new ones included
    observe(weights, memory, encodings, shown)    -> memory after r more requests, oldest first
    score(weights, memory, encodings, request, there [b, c] bool)
                                                  -> scores [b, N, c] of every agent; the last one ranks

and those of the feedback model, with an axis of its 2 twins after [b] in memories and before [m] in encodings:

    model_encode, model_observe
    model_predict(weights, memory, encodings, request, exposed [b, c]) -> {"feedback": expected [b, c, S],
                                                     "continue_prob": [b] of another request after that exposure}

    video    {"author", "tag", "embedding_id": [m] int32, "features": [m, Di]}
    memory   {name: [b, *shape]} of the manifest's "carry" and "model_carry", which the user encoder decides
             (`models.user_encoders`); all zeros for an unknown user
    shown    {"videos": [b, r, k] item rows, "duration": [b, r, k] s, "feedback": [b, r, k, S],
             "mask": [b, r, k] bool, "context": [b, r, Dx]}; a history is cut into requests of K, their contexts zeros
    request  {"user_id": [b], "profile": [b, Du], "context": [b, Dx], "candidates": [b, c] item rows}

The sizes m, b, r, k, c and V, the rows of `encodings`, are symbolic: one artefact serves any. If `there` is False a
candidate is padding, and its scores are undefined.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.agents.mmrf import agent_state, policy
from mmrf_jax.agents.mmrf.config import AgentConfig
from mmrf_jax.data.session_log import InputSpec
from mmrf_jax.models import embedding_table, embeddings, encoders, representation, user_encoders
from mmrf_jax.models.encoder_config import EncoderConfig
from mmrf_jax.models.feedback_model import network
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.serving import artifact
from mmrf_jax.serving.artifact import Arrays, Function
from mmrf_jax.training import configs, inputs, run_folder, steps
from mmrf_jax.training.train_state import TrainState

_IDS = {"author": "author", "id": "embedding_id", "tag": "tag"}  # table -> field of a video


@dataclasses.dataclass
class _Trained:
    """The fields of an `agents.mmrf.agent_state.AgentState` that a method needs for scoring."""

    params: Any
    target: Any
    reward_scale: chex.Array
    q_mean: chex.Array
    q_scale: chex.Array


def export_workdir(config: configs.Run, workdir: Path, out: Path) -> tuple[str, int]:
    """Export the newest state of a run folder with its config and results; return the artefact's id and the step."""
    found, state, about = _trained(config, workdir)
    plan = steps.plan_of(config, found.spec.signals)
    known = found.users, found.vocabularies
    made = export_run(out, plan, found.spec, found.items, found.video_ids, state, about, *known)
    return made, about["step"]


def in_memory(config: configs.Run, workdir: Path) -> artifact.Artifact:
    """Return the artefact of a run folder without writing it; its functions are not serialised."""
    found, state, about = _trained(config, workdir)
    plan = steps.plan_of(config, found.spec.signals)
    known = found.users, found.vocabularies
    functions, arrays, more = _contents(plan, found.spec, found.items, found.video_ids, state, *known)
    return artifact.Artifact(f"step {about['step']}", about | more, found.spec, functions, arrays)


def _trained(config: configs.Run, workdir: Path) -> tuple[inputs.Inputs, TrainState, dict[str, Any]]:
    """Return inputs and newest state of a run folder, and what a manifest says about the run."""
    from mmrf_jax.training import restore  # imports every source of sessions

    found, state = restore.load_trained(config, workdir, Partitioner())
    about: dict[str, Any] = {"config": configs.as_dict(config), "step": int(state.agents.step), "code": found.code}
    about |= {name: getattr(found, name) for name in ("unknown_video", "names", "num_statistics")}
    for name in ("learned", "results"):  # the metrics files that exist
        path = workdir / f"{name}.json"
        about[name] = run_folder.read_json(path) if path.exists() else None
    return found, state, about


def export_run(
    folder: Path,
    plan: steps.TrainConfig,
    spec: InputSpec,
    items: types.Items,
    video_ids: np.ndarray | None,
    state: TrainState,
    about: dict[str, Any],
    users: Arrays | None = None,
    vocabularies: Arrays | None = None,
) -> str:
    """Write the artefact of a trained state and return its id; see `artifact.write` for errors.

    Args:
      folder: folder to create.
      plan: config of the run.
      spec: spec of the requests.
      items: the items.
      video_ids: [V] ids of the videos in requests, integers or strings; None if they are item rows.
      state: the trained state.
      about: contents of the manifest in addition to signals, agents and sizes.
      users: {"user_id": [U] ids, "profile": [U, Du]}, where users are known.
      vocabularies: {"author", "tag": the platform's ids [n] of their rows 1, 2, …, in order}; None if these are numbers
        of rows.
    """
    functions, arrays, more = _contents(plan, spec, items, video_ids, state, users, vocabularies)
    return artifact.write(folder, functions, arrays, spec, about | more)


def _contents(
    plan: steps.TrainConfig,
    spec: InputSpec,
    items: types.Items,
    video_ids: np.ndarray | None,
    state: TrainState,
    users: Arrays | None,
    vocabularies: Arrays | None,
) -> tuple[dict[str, Function], dict[str, Arrays], dict[str, Any]]:
    """Return functions, arrays and manifest of the artefact of a trained state."""
    if plan.agents.own_critics:
        raise ValueError("a run of agents.critics=own is for studies and cannot be exported; train with 'shared'")
    v = spec.num_videos
    functions = _policy_functions(plan, spec, state.agents)
    arrays = {
        "policy": _flat(_policy_weights(state.agents)),
        "catalogue": {
            "video_id": _ids(np.arange(v) if video_ids is None else video_ids),
            "features": np.asarray(items.features_of(np.arange(v))),
            **{n: np.asarray(getattr(items, n)) for n in ("author", "tag", "duration", "embedding_id")},
        },
    }
    if users is not None:
        arrays["users"] = users
    if vocabularies is not None:
        arrays["vocabularies"] = vocabularies
    carries = {"carry": carry_shapes(plan.agents, spec)}
    if plan.use_feedback_model:
        assert state.feedback is not None
        functions |= _model_functions(plan, spec, state.feedback)
        arrays["model"] = _flat(_model_weights(state.feedback))
        carries["model_carry"] = carry_shapes(plan.feedback, spec)
    about = {
        "method": plan.method,
        "agents": list(registry.get(plan.method).signals(plan.agents)),
        "signals": list(spec.signals.names),
    }
    return functions, arrays, about | carries


def _ids(given: np.ndarray) -> np.ndarray:
    return given.astype(np.int64) if given.dtype.kind == "i" else given  # or strings, or integers above those


def carry_shapes(config: EncoderConfig, spec: InputSpec) -> dict[str, list[int]]:
    """Return the shapes of what is carried of a user, by name; all are float32."""
    users, dim = user_encoders.of(config), encoders.sizes(config, spec)[1]
    return {name: list(x.shape) for name, x in _as_dict(jax.eval_shape(lambda: users.init((), dim))).items()}


def _policy_weights(agents: agent_state.AgentState) -> dict[str, Any]:
    known = {name: getattr(agents, name) for name in ("params", "target", "reward_scale", "q_mean", "q_scale")}
    return known | {"tables": _rows(agents.tables)}


def _model_weights(model: network.FeedbackState) -> dict[str, Any]:
    known = {"scale": model.scale, "calibration": model.calibration}
    return {"params": model.params, **known, "tables": _rows(model.tables)}


def _rows(tables: dict[str, embedding_table.Table]) -> dict[str, jax.Array]:
    return {name: t.rows.astype(jnp.float32) for name, t in tables.items()}  # npz has no bfloat16


def _tables(like: dict[str, embedding_table.Table], rows: dict[str, chex.Array]) -> dict[str, embedding_table.Table]:
    """Return tables with these rows and the vocabularies of `like`; their optimiser state is a placeholder."""
    return {name: dataclasses.replace(t, rows=rows[name], accumulator=rows[name][:, 0]) for name, t in like.items()}


def _flat(tree: dict[str, Any]) -> Arrays:
    return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(tree, sep=artifact.SEPARATOR).items()}


def _shapes(tree) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class _Sizes:
    """Shapes of arguments with symbolic sizes, all in one scope."""

    def __init__(self):
        names = ("b", "c", "k", "m", "r", "v")
        self._size = dict(zip(names, export.symbolic_shape(",".join(names)), strict=True))

    def __call__(self, shape: str, *fixed: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        """Return a shape: letters of symbolic sizes, or 2 for the twins, then the `fixed` sizes."""
        return jax.ShapeDtypeStruct((*(2 if n == "2" else self._size[n] for n in shape), *fixed), dtype)


def _arguments(config: EncoderConfig, spec: InputSpec, twins: str) -> dict[str, Any]:
    """Return the shapes of all arguments except weights; `twins` is "2" for the feedback model, "" for the agents."""
    size, dim = _Sizes(), encoders.sizes(config, spec)[1]
    ids = {name: size("m", dtype=jnp.int32) for name in _IDS.values()}
    return {
        "video": ids | {"features": size("m", spec.item_features)},
        "memory": {name: size("b" + twins, *shape) for name, shape in carry_shapes(config, spec).items()},
        "encodings": size(twins + "v", dim),
        "shown": {
            "videos": size("brk", dtype=jnp.int32),
            "duration": size("brk"),
            "feedback": size("brk", len(spec.signals)),
            "mask": size("brk", dtype=jnp.bool_),
            "context": size("br", spec.context),
        },
        "request": {
            "user_id": size("b", dtype=jnp.int32),
            "profile": size("b", spec.profile),
            "context": size("b", spec.context),
            "candidates": size("bc", dtype=jnp.int32),
        },
        "there": size("bc", dtype=jnp.bool_),
        "exposed": size("bc"),
    }


def _as_dict(carry: Any) -> dict[str, Any]:
    return {field.name: getattr(carry, field.name) for field in dataclasses.fields(carry)}


def _carry(config: EncoderConfig, memory: dict[str, chex.Array]) -> Any:
    """Return the carry of a dictionary of `_as_dict`."""
    like = jax.eval_shape(lambda: user_encoders.of(config).init((), 1))
    return dataclasses.replace(like, **memory)


def _observed(config: EncoderConfig, params: Any, carry: Any, encodings: chex.Array, shown: dict[str, chex.Array]):
    """Return the carry after more requests, as a dictionary."""
    users, items = user_encoders.of(config), encodings[shown["videos"]]
    rest = (shown[name] for name in ("feedback", "duration", "mask", "context"))
    return _as_dict(users.update_all(params, carry, users.shown(params, items, *rest)))


def _policy_functions(plan: steps.TrainConfig, spec: InputSpec, agents: agent_state.AgentState) -> dict[str, Function]:
    config: AgentConfig = plan.agents
    encoder, method, like = encoders.Encoder(config), registry.get(plan.method), _shapes(agents.tables)

    def encode(weights, video):
        tables = _tables(like, weights["tables"])
        rows = embeddings.lookup(tables, {name: video[field] for name, field in _IDS.items()})
        return encoder.apply(weights["params"]["encoder"], rows, video["features"], method="items")

    def observe(weights, memory, encodings, shown):
        return _observed(config, weights["params"]["encoder"], _carry(config, memory), encodings, shown)

    def score(weights, memory, encodings, request, there):
        users = _tables(like, weights["tables"])[embeddings.USER_TABLE]
        asked, carried = types.Request(**request), _carry(config, memory)
        z = policy.user_state(config, {"encoder": weights["params"]["encoder"], "users": users}, carried, asked)
        known = cast(agent_state.AgentState, _Trained(**{name: x for name, x in weights.items() if name != "tables"}))
        nothing = jnp.zeros((0,))
        # Actors centre their messages over the candidates. That is linear in the encodings, so padding with the mean
        # encoding of the candidates does not change it.
        e, real = encodings[asked.candidates], there[..., None]
        mean = jnp.sum(jnp.where(real, e, 0.0), axis=1, keepdims=True) / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
        before = representation.Encoded(z, carried, nothing, nothing)
        return method.score(config, known, before, jnp.where(real, e, mean))

    a, weights = _arguments(config, spec, ""), _shapes(_policy_weights(agents))
    return {
        "encode": Function(encode, (weights, a["video"])),
        "observe": Function(observe, (weights, a["memory"], a["encodings"], a["shown"])),
        "score": Function(score, (weights, a["memory"], a["encodings"], a["request"], a["there"])),
    }


def _model_functions(plan: steps.TrainConfig, spec: InputSpec, model: network.FeedbackState) -> dict[str, Function]:
    config = plan.feedback
    encoder, like = encoders.Encoder(config), _shapes(model.tables)
    both = jax.vmap

    def encode(weights, video):
        rows = embeddings.lookup(_tables(like, weights["tables"]), {name: video[field] for name, field in _IDS.items()})

        def apply(p, r):
            return encoder.apply(p, r, video["features"], method="items")

        return both(apply)(weights["params"]["encoder"], network.twin_rows(rows))

    def observe(weights, memory, encodings, shown):
        def one(p, carry, e):
            return _observed(config, p, carry, e, shown)

        return both(one, (0, 1, 0), 1)(weights["params"]["encoder"], _carry(config, memory), encodings)

    def predict(weights, memory, encodings, request, exposed):
        rows = embeddings.lookup(_tables(like, weights["tables"]), {embeddings.USER_TABLE: request["user_id"]})
        carried = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), _carry(config, memory))

        def user(p, m, r):
            return user_encoders.of(config).read(p, m, r, request["profile"], request["context"])

        z = both(user)(weights["params"]["encoder"], carried, network.twin_rows(rows)[embeddings.USER_TABLE])
        out = network.predict(config, weights["params"], z, carried.mean(), encodings[:, request["candidates"]])
        out = network.calibrated(config, out, weights["calibration"], request["context"])
        feedback = network.expected(config, out, weights["scale"])
        return {"feedback": feedback, "continue_prob": network.continue_prob(out, exposed)}

    a, weights = _arguments(config, spec, "2"), _shapes(_model_weights(model))
    return {
        "model_encode": Function(encode, (weights, a["video"])),
        "model_observe": Function(observe, (weights, a["memory"], a["encodings"], a["shown"])),
        "model_predict": Function(predict, (weights, a["memory"], a["encodings"], a["request"], a["exposed"])),
    }
