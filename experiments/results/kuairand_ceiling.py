"""How well can videos be ranked for KuaiRand's users at all, without their own feedback of the test days?

  python -m experiments.results.kuairand_ceiling --data_dir=$KUAIRAND_DIR

Prints GAUC on the test days for LightGBM as a user would fit it, for ensembles of it, and for predictors that no ranker
could have: they know what *other* users answered on the test days. Takes three minutes on two cores.
"""

import numpy as np
from absl import app, flags

_DATA = flags.DEFINE_string("data_dir", None, "Folder of KuaiRand's CSV files.", required=True)
_SIGNALS = ("click", "long_view")
_FOLDS, _TREES, _SEEDS, _PRIOR = 5, 250, 5, 10.0


def main(_):
    from experiments import kuairand
    from mmrf_jax import metrics
    from mmrf_jax.agents import boosting
    from mmrf_jax.io.progress import counted
    from mmrf_jax.training import configs, restore

    config = kuairand.get_config()
    config.data.dir = _DATA.value
    source = restore.open_source(configs.run_of(config.to_dict()), counted)
    assert source.valid is not None  # the packaged config has a validation day
    train, valid, test = source.train(), source.valid(), source.test()["test"]
    known = [boosting.table(log, source.items, source.spec.signals, [train]) for log in (train, valid)]
    features, feedback = (np.concatenate([getattr(rows, name) for rows in known]) for name in ("features", "feedback"))
    rows = boosting.table(test, source.items, source.spec.signals, [train, valid])
    print("| predictor | " + " | ".join(_SIGNALS) + " |\n|---|---|---|")
    columns = []
    for name in _SIGNALS:
        at = source.spec.signals.index(name)
        scores = predictors(
            features, feedback[:, at], np.concatenate([x.user for x in known]), rows, rows.feedback[:, at]
        )
        columns.append({key: metrics.gauc(rows.feedback[:, at], x, rows.user) for key, x in scores.items()})
    for key in columns[0]:
        cells = (f"{c[key].value:.4f} [{c[key].low:.4f}, {c[key].high:.4f}]" for c in columns)
        print(f"| {key} | {' | '.join(cells)} |")


def predictors(features, label, user, test, answer):
    """Return {name: scores [n] of the test exposures} of predictors fitted to features [m, F] and labels [m].

    Args:
      user: [m] of the exposures that are fitted, for the pairwise objective.
      test: the `boosting.Table` of the n test exposures.
      answer: [n] their labels; each fold of users is scored by predictors that know only the labels of other folds.
    """
    trees = [_fit(features, label, seed) for seed in range(_SEEDS)]
    ensemble = np.mean([x.predict(test.features, raw_score=True) for x in trees], axis=0)
    order = np.argsort(user, kind="stable")
    sizes = np.unique(user, return_counts=True)[1]
    pairwise = _fit(features[order], label[order], 0, objective="lambdarank", group=sizes).predict(test.features)
    out = {
        "LightGBM": trees[0].predict(test.features, raw_score=True),
        f"LightGBM, {_SEEDS} seeds averaged": ensemble,
        "LightGBM, LambdaRank within users": pairwise,
        "both averaged": ensemble / ensemble.std() + pairwise / pairwise.std(),
    }
    fold = np.random.default_rng(0).integers(0, _FOLDS, test.user.max() + 1)[test.user]
    means, informed = np.zeros(len(answer)), np.zeros(len(answer))
    for i in range(_FOLDS):
        others, mine = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
        seen = _means(test.video, answer, others, others), _means(test.video, answer, others, mine)
        means[mine] = seen[1][:, 0]
        inputs = [
            np.concatenate([test.features[x], found, ensemble[x, None]], axis=1)
            for x, found in zip((others, mine), seen, strict=True)
        ]
        informed[mine] = _fit(inputs[0], answer[others], 0, trees=_TREES // 2).predict(inputs[1], raw_score=True)
    out["test days' mean of the video among other users"] = means
    out["LightGBM, also fitted to other users' test days"] = informed
    out["that and the ensemble averaged"] = informed + ensemble
    return out


def _fit(features, label, seed, objective="binary", group=None, trees=_TREES):
    import lightgbm

    from mmrf_jax.agents import boosting

    parameters = boosting.PARAMETERS | {"objective": objective, "seed": seed}
    return lightgbm.train(parameters, lightgbm.Dataset(features, label, group=group), trees)


def _means(video, answer, known, rows):
    """Return means and log counts [len(rows), 2] of the videos among `known`, without the row's own answer."""
    size = video.max() + 1
    count, total = np.bincount(video[known], minlength=size), np.bincount(video[known], answer[known], size)
    own = np.isin(rows, known)
    n, s = count[video[rows]] - own, total[video[rows]] - own * answer[rows]
    return np.stack([(s + _PRIOR * answer[known].mean()) / (n + _PRIOR), np.log1p(n)], axis=1)


if __name__ == "__main__":
    app.run(main)
