"""The results of a run as tables of text."""

from __future__ import annotations

from typing import Any

from mmrf_jax.abtest import summary
from mmrf_jax.io import tables
from mmrf_jax.metrics import model_quality, offline
from mmrf_jax.ope import behavior_policy, estimators


def print_results(result: dict[str, Any]) -> None:
    """Print the result tables to stdout."""
    if "ab_test" in result or "aa" in result:
        print(summary.describe(result))
    for name, entries in offline.by_log(result, "offline").items():
        if name != "test":
            print(f"\n{name}:")
        print(offline.format_offline(entries))
    for name, entries in offline.by_log(result, "model_quality").items():
        print(f"\nmodel quality, {name}:")
        print(model_quality.format_model_quality(entries))
    for name, entries in result.get("off_policy", {}).items():
        print(f"\noff-policy estimates of the stochastic ranker, {name}, {entries['propensities']} propensities:")
        print(estimators.format_estimates(entries["units"]))
        if "behaviour" in entries:
            print(f"\npropensities of the behaviour model, {name}:")
            print(behavior_policy.format_calibration(entries["behaviour"]))
    for name, entries in result.get("simulated_sessions", {}).items():
        print(f"\nsessions of the feedback model and of the log, {name}:")
        print(_table({"model": entries}, ("ks", "simulated", "actual")))
    for name, entries in result.get("excess_logloss", {}).items():
        print(f"\nlog-loss beyond what was expected, by decile of uncertainty, {name}:")
        for signal, deciles in entries.items():
            print(f"{signal:<14}" + " ".join(f"{decile['excess']:+.4f}" for decile in deciles))
    if "selection_bias" in result:
        print("\nmean |predicted − true| on impressions and on non-impressions, and their ratio:")
        print(_table(result["selection_bias"], ("impressions", "non_impressions", "ratio")))
    if "uncertainty" in result:
        print("\nrank correlation of uncertainty with |predicted − true|, and AUC of it for videos with few exposures:")
        columns = ("spearman", "within_deciles", "spearman_of_prediction", "cold_auc")
        print(_table({"model": result["uncertainty"]}, columns))
    if "sample_auc" in result:
        print(f"\nAUC of sampled non-impressions against the pool: {result['sample_auc']:.4f}")


def _table(entries: dict[str, dict[str, dict[str, Any]]], columns: tuple[str, ...]) -> str:
    """Format the numbers of {predictor: {signal: {column: number, or None}}}."""
    rows = [
        [signal, predictor, *("–" if entry[name] is None else f"{entry[name]:.4g}" for name in columns)]
        for predictor, signals in entries.items()
        for signal, entry in signals.items()
    ]
    return tables.markdown(("signal", "predictor", *columns), rows)
