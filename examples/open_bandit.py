"""Estimate the uniform policy's click rate from the Open Bandit Dataset's logs of Thompson sampling. Needs no JAX.

The rows of the uniform policy's own log have the answer, up to their noise. Set OBD_DIR to a folder with
`bts/CAMPAIGN/CAMPAIGN.csv` (or `.csv.gz`), `random/…` and `item_context.csv`, as in the package `obp` (Saito et al.,
NeurIPS Datasets and Benchmarks 2021):

OBD_DIR=FOLDER python examples/open_bandit.py
"""

import csv
import gzip
import os
from pathlib import Path

import numpy as np

import mmrf_jax as mmrf

CAMPAIGNS = ("all", "men", "women")
ESTIMATORS = {"ips": "IPS", "snips": "SNIPS", "dr": "DR, cap 10", "switch_dr": "Switch-DR", "dros": "DRos"}
PRIOR_ROWS = 100  # of the campaign's click rate, in the click rate of an item


def read(folder: Path, campaign: str) -> dict[str, np.ndarray]:
    """Return the columns [n] of a log, and its number of items."""
    path = folder / campaign / f"{campaign}.csv"
    with path.open(newline="") if path.exists() else gzip.open(f"{path}.gz", "rt", newline="") as file:
        rows = [(row["item_id"], row["click"], row["propensity_score"]) for row in csv.DictReader(file)]
    item, click, propensity = (np.array(x, float) for x in zip(*rows, strict=True))
    with (folder / campaign / "item_context.csv").open(newline="") as file:
        items = sum(1 for _ in csv.DictReader(file))
    return {"item": item.astype(int), "click": click, "propensity": propensity, "items": items}


def click_model(log: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's predicted click rate, and its mean over all items; rows do not predict themselves.

    The rate of an item is that of the other half of the log, drawn towards the campaign's.
    """
    half = np.arange(len(log["click"])) % 2
    predicted, uniform = np.empty(len(half)), np.empty(len(half))
    for fold in (0, 1):
        item, click = log["item"][half != fold], log["click"][half != fold]
        clicks, rows = (np.bincount(item, x, log["items"]) for x in (click, np.ones(len(item))))
        rate = (clicks + PRIOR_ROWS * click.mean()) / (rows + PRIOR_ROWS)
        predicted[half == fold], uniform[half == fold] = rate[log["item"][half == fold]], rate.mean()
    return predicted, uniform


def uniform_policy(folder: Path, campaign: str) -> dict[str, mmrf.Estimate]:
    """Return the click rate of the uniform policy by its own log, and by estimates from the other policy's log."""
    own, log = read(folder / "random", campaign), read(folder / "bts", campaign)
    same = np.full(len(own["click"]), 1.0 / own["items"])
    found = {"random": mmrf.ope.estimate(own["click"], pscore=own["propensity"], target_pscore=same)["snips"]}
    return found | mmrf.ope.estimate(
        log["click"],
        pscore=log["propensity"],
        target_pscore=np.full(len(log["click"]), 1.0 / log["items"]),
        estimators=tuple(ESTIMATORS),
        reward_model=click_model(log),
    )


def table(found: dict[str, dict[str, mmrf.Estimate]]) -> str:
    """Return click rates in per cent with 95 % intervals as a Markdown table of estimators × campaigns."""

    def cell(x: mmrf.Estimate) -> str:
        return f"{100 * x.value:.2f} [{100 * x.low:.2f}, {100 * x.high:.2f}], {x.ess:,.0f}"

    lines = [f"| click rate, %, and effective rows | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for name, title in {"random": "rows of the uniform policy", **ESTIMATORS}.items():
        lines.append(f"| {title} | {' | '.join(cell(x[name]) for x in found.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "OBD_DIR" in os.environ:
        print(table({campaign: uniform_policy(Path(os.environ["OBD_DIR"]), campaign) for campaign in CAMPAIGNS}))
    else:
        print("nothing to estimate: set OBD_DIR to the folder of the Open Bandit Dataset")
