"""`examples/open_bandit.py` on the real log: formulas by hand, the uniform policy's own rows, and the page's table."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = os.environ.get("OBD_DIR", "")

pytestmark = pytest.mark.skipif(
    not Path(SOURCE, "bts").is_dir(),
    reason="OBD_DIR is unset or names no folder: set it to a folder of the Open Bandit Dataset",
)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("open_bandit", ROOT / "examples" / "open_bandit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(example):
    return {campaign: example.uniform_policy(Path(SOURCE), campaign) for campaign in example.CAMPAIGNS}


def read(policy, campaign):
    path = Path(SOURCE, policy, campaign, f"{campaign}.csv")
    return pd.read_csv(path if path.exists() else f"{path}.gz")


def test_estimates_are_the_formulas_on_the_files(found):
    log, items = read("bts", "men"), len(pd.read_csv(Path(SOURCE, "bts", "men", "item_context.csv")))
    w, r = 1.0 / items / log["propensity_score"], log["click"]
    rows = np.arange(len(log))
    clicks = log["click"].groupby([rows % 2, log["item_id"]]).agg(["sum", "size"]).unstack(fill_value=0)
    rate = (clicks["sum"].T + 100 * r.groupby(rows % 2).mean()) / (clicks["size"].T + 100)
    q = np.array([rate.loc[item, 1 - half] for item, half in zip(log["item_id"], rows % 2, strict=True)])
    v = rate.mean()[1 - rows % 2].to_numpy()
    wanted = {"ips": (w * r).mean(), "snips": (w * r).sum() / w.sum(), "dr": (v + np.minimum(w, 10) * (r - q)).mean()}
    wanted |= {"switch_dr": (v + w * (w <= 10) * (r - q)).mean(), "dros": (v + 100 * w / (w**2 + 100) * (r - q)).mean()}
    wanted |= {"random": read("random", "men")["click"].mean()}
    for name, value in wanted.items():
        assert found["men"][name].value == pytest.approx(value, rel=1e-10), name


def test_the_uniform_policy_s_own_click_rate_is_within_the_intervals(found):
    for campaign, estimates in found.items():
        for name in ("dr", "switch_dr", "dros"):
            assert estimates[name].low < estimates["random"].value < estimates[name].high, (campaign, name)


def test_the_page_has_what_the_command_prints(example, found):
    assert example.table(found) in (ROOT / "docs" / "open-bandit.md").read_text()
