"""Does a correction for selection bias help the feedback model on KuaiRand, without any random exposure in training?

  python -m experiments.results.kuairand_debias --data_dir=$KUAIRAND_DIR
  python -m experiments.results.kuairand_debias --data_dir=$KUAIRAND_DIR --imputed=0.25,1,2

Fits the feedback model of the packaged config alone, without agents, and calibrates it on 05-03: as it is, with inverse
propensity weights, and with imputed feedback of videos that were not shown (Steck, 2010) by each weight of --imputed.
Prints its quality on the standard and on the random log of the test days. Takes two minutes a model on two cores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import kuairand
from mmrf_jax import types
from mmrf_jax.data import sessions
from mmrf_jax.io.progress import counted
from mmrf_jax.metrics import model_quality, offline
from mmrf_jax.models.feedback_model import fitting, network
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.training import batches, configs, predictions, restore, startup, steps

_DATA = flags.DEFINE_string("data_dir", None, "Folder of KuaiRand's CSV files.", required=True)
_IMPUTED = flags.DEFINE_list("imputed", ["0.5"], "Weights of videos that were not shown.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the model.")
_SIGNALS = ("click", "long_view", "watch_time")
_MEASURED = 16  # batches of 05-03


def main(_):
    startup.start_jax()
    config = kuairand.get_config()
    config.data.dir, config.seed = _DATA.value, _SEED.value
    config = configs.run_of(config.to_dict())
    source = restore.open_source(config, counted)
    known = offline.exposures(source.train())
    variants: dict[str, dict[str, Any]] = {"model": {}, "propensity": {"debias": "propensity"}}
    variants |= {f"imputed, weight {weight}": {"imputed_weight": float(weight)} for weight in _IMPUTED.value}
    predicted = {}
    for name, fields in variants.items():
        predicted[name] = fitted(configs.override(config, feedback=fields), source)
    print("| log | signal | predictor | GAUC / XAUC | ECE / RMSE | log-loss / MAE | log-loss / MAE − model |")
    print("|---|---|---|---|---|---|---|")
    for log in source.test():
        rows = predicted["model"][log][0]
        of = {name: found[log][1] for name, found in predicted.items()}
        of["per_video_mean"] = model_quality.per_video_mean(
            source.spec.signals, known.video, known.feedback, rows.video, source.items.num_videos
        )
        of = {name: {signal: x for signal, x in values.items() if signal in _SIGNALS} for name, values in of.items()}
        found = model_quality.metrics(source.spec.signals, rows.user_id, rows.feedback, of)
        for signal in _SIGNALS:
            rank, error, loss = ("xauc", "rmse", "mae") if signal == "watch_time" else ("gauc", "ece", "logloss")
            for name, entry in found[signal].items():
                cells = [f"{entry[key]:.4f}" for key in (rank, error, loss)]
                minus = entry.get("model_minus", {}).get(loss, {}).get("ci95")
                cells.append("–" if minus is None else f"[{-minus[1]:+.4f}, {-minus[0]:+.4f}]")
                print(f"| {log} | {signal} | {name} | {' | '.join(cells)} |")


def fitted(config, source):
    """Return {test log: (its exposures, {signal: predictions [n]})} of a feedback model that is fitted here."""
    plan, partitioner = steps.plan_of(config, source.spec.signals), Partitioner()
    train, segment = source.train(), config.train.segment
    data = batches.InMemoryBatches(config, train, partitioner)
    mean, std, _ = data.feedback_statistics(config.agents.discount)
    init = jax.jit(network.init_feedback_state, static_argnames=("config", "spec"))
    key = jax.random.fold_in(types.make_key(config.seed), 1)
    model = init(key, plan.feedback, source.spec, source.items, np.float32(mean), np.float32(std))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(model, batch, items, lr_scale):
        if plan.feedback.debias is not None and plan.others is not None:  # as in training
            batch = steps.with_fewer_candidates(batch, jax.random.fold_in(model.key, model.step), plan.others)
        return fitting.update(model, batch, items, plan.feedback, lr_scale)

    with batches.PhaseIterator(data, "feedback", 0, config.feedback.epochs, 0, steps.lr_scale_at) as phase:
        for batch, lr_scale in phase:
            model, _ = update(model, batch, source.items, lr_scale)
    log = source.valid()
    index = sessions.segment_index(log, segment)
    held = batches.measured_batches(log, index, segment, config.feedback.batch, _MEASURED, plan.feedback.exposures)
    model = fitting.measure(model, held, source.items, plan.feedback, calibrate=True)

    @functools.partial(jax.jit, static_argnames="config")
    def predict(model, batch, items, config):
        encoded = network.encode_batch(config, model, batch, items, predictions.exposed_videos(batch))
        out = network.predict(config, model.params, *encoded.user, encoded.unseen)
        out = network.calibrated(config, out, model.calibration, batch.context)
        return jnp.moveaxis(network.expected(config, out, model.scale), -1, -2)

    def score(batch):
        return predict(model, batch, source.items, plan.feedback)

    found = {name: offline.score_log(score, log, num_requests=segment) for name, log in source.test().items()}
    return {name: (x, dict(zip(source.spec.signals.names, x.scores.T, strict=True))) for name, x in found.items()}


if __name__ == "__main__":
    app.run(main)
