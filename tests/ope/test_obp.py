"""`mmrf.ope.estimate` against Open Bandit Pipeline (`obp` 0.5.7): its numbers below, and live where it is installed."""

import numpy as np
import pytest

import mmrf_jax as mmrf

CAP, TAU, SHRINKAGE = 3.0, 2.0, 5.0
#: What obp 0.5.7 returns for `bandit()` and `ranking()`; `by_obp` has the calls.
BY_OBP = {
    "ips": 0.16860262416339306,
    "snips": 0.11462918573952124,
    "dm": 0.49779176766406363,
    "dr": 0.1342802836243839,
    "sndr": 0.13081330821879442,
    "switch_dr": 0.3533544765800377,
    "dros": 0.31002840044918967,
    "sips": 3.829907448345909,
    "iips": 1.8533703123636456,
    "rips": 2.9778220620013456,
    "snsips": 1.5527765443561123,
    "sniips": 1.5237584374345279,
    "snrips": 1.5843212281276067,
    "cascade_dr": 1.1560869205306057,
}


def wave(n, *factors):
    """Numbers in (0, 1) that no generator has to reproduce, [n, len(factors)]."""
    return (np.outer(np.arange(1, n + 1), factors) % 101 + 0.5) / 102


def choices(numbers):
    """Probabilities of actions, from numbers [..., A]."""
    return numbers / numbers.sum(axis=-1, keepdims=True)


def bandit(n=200, actions=5):
    """A log of single decisions: [n] each, but [n, actions] for the policy and for q."""
    behaviour = choices(wave(n, 7, 19, 29, 43, 61)[:, :actions] + 0.05)
    policy = choices(wave(n, 67, 11, 83, 23, 37)[:, :actions] ** 3 + 0.001)
    action = (np.arange(n) * 17 % actions).astype(int)
    q = wave(n, 31, 53, 13, 71, 89)[:, :actions]
    reward = (wave(n, 47)[:, 0] < 0.4) * wave(n, 59)[:, 0]
    pick = np.arange(n)
    return {
        "action": action,
        "reward": reward,
        "pscore": behaviour[pick, action],
        "policy": policy,
        "q": q,
    }


def ranking(slates=60, slots=3, actions=4):
    """A log of slates: rows [slates × slots], probabilities given the items above, and marginal ones."""
    n = slates * slots
    behaviour = choices(wave(n, 7, 19, 29, 43) + 0.1)
    policy = choices(wave(n, 67, 11, 83, 23) ** 2 + 0.01)
    action = (np.arange(n) * 13 % actions).astype(int)
    pick = np.arange(n)
    return {
        "slate_id": np.repeat(np.arange(slates), slots),
        "position": np.tile(np.arange(slots), slates),
        "action": action,
        "reward": (wave(n, 47)[:, 0] < 0.5).astype(float),
        "pscore": behaviour[pick, action],
        "target_pscore": policy[pick, action],
        "policy": policy,
        "q": 2.0 * wave(n, 31, 53, 13, 71),
    }


def by_us():
    b, r = bandit(), ranking()
    pick = np.arange(len(b["action"]))
    found = mmrf.ope.estimate(
        b["reward"],
        pscore=b["pscore"],
        target_pscore=b["policy"][pick, b["action"]],
        estimators=("ips", "snips", "dm", "dr", "sndr", "switch_dr", "dros"),
        cap=CAP,
        tau=TAU,
        shrinkage=SHRINKAGE,
        reward_model=(b["q"][pick, b["action"]], (b["policy"] * b["q"]).sum(axis=1)),
    )
    mixed = np.random.default_rng(0).permutation(len(r["reward"]))  # slots come in any order
    pick = np.arange(len(r["reward"]))
    columns = {name: r[name][mixed] for name in ("pscore", "target_pscore", "slate_id", "position")}
    found |= mmrf.ope.estimate(
        r["reward"][mixed],
        estimators=("sips", "iips", "rips", "snsips", "sniips", "snrips", "cascade_dr"),
        reward_model=(r["q"][pick, r["action"]][mixed], (r["policy"] * r["q"]).sum(axis=1)[mixed]),
        **columns,
    )
    return {name: x.value for name, x in found.items()}


def by_obp():
    """The same by obp, whose probabilities of slates are joint."""
    ope = pytest.importorskip("obp.ope")
    b, r = bandit(), ranking()
    model = {"estimated_rewards_by_reg_model": b["q"][..., None]}
    log = {
        "reward": b["reward"],
        "action": b["action"],
        "pscore": b["pscore"],
        "action_dist": b["policy"][..., None],
        "position": np.zeros(len(b["action"]), int),
    }
    found = {
        "ips": ope.InverseProbabilityWeighting().estimate_policy_value(**log),
        "snips": ope.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**log),
        "dm": ope.DirectMethod().estimate_policy_value(**log, **model),
        "dr": ope.DoublyRobust(lambda_=CAP).estimate_policy_value(**log, **model),
        "sndr": ope.SelfNormalizedDoublyRobust().estimate_policy_value(**log, **model),
        "switch_dr": ope.SwitchDoublyRobust(lambda_=TAU).estimate_policy_value(**log, **model),
        "dros": ope.DoublyRobustWithShrinkage(lambda_=SHRINKAGE).estimate_policy_value(**log, **model),
    }
    slots, actions = 3, r["policy"].shape[1]
    joint = {name: r[name].reshape(-1, slots).cumprod(axis=1) for name in ("pscore", "target_pscore")}
    whole = {name: np.repeat(x[:, -1], slots) for name, x in joint.items()}
    rows = {name: r[name] for name in ("slate_id", "reward", "position")}
    marginal = {
        "pscore_item_position": r["pscore"],
        "evaluation_policy_pscore_item_position": r["target_pscore"],
    }
    cascade = {
        "pscore_cascade": joint["pscore"].ravel(),
        "evaluation_policy_pscore_cascade": joint["target_pscore"].ravel(),
    }
    slate = {"pscore": whole["pscore"], "evaluation_policy_pscore": whole["target_pscore"]}
    found |= {
        "sips": ope.SlateStandardIPS(slots).estimate_policy_value(**rows, **slate),
        "iips": ope.SlateIndependentIPS(slots).estimate_policy_value(**rows, **marginal),
        "rips": ope.SlateRewardInteractionIPS(slots).estimate_policy_value(**rows, **cascade),
        "snsips": ope.SelfNormalizedSlateStandardIPS(slots).estimate_policy_value(**rows, **slate),
        "sniips": ope.SelfNormalizedSlateIndependentIPS(slots).estimate_policy_value(**rows, **marginal),
        "snrips": ope.SelfNormalizedSlateRewardInteractionIPS(slots).estimate_policy_value(**rows, **cascade),
        "cascade_dr": ope.SlateCascadeDoublyRobust(slots, actions).estimate_policy_value(
            **rows,
            **cascade,
            action=r["action"],
            q_hat=r["q"].ravel(),
            evaluation_policy_action_dist=r["policy"].ravel(),
        ),
    }
    return {name: float(value) for name, value in found.items()}


def test_values_are_those_that_obp_printed():
    found = by_us()
    assert found.keys() == BY_OBP.keys() and len(set(BY_OBP.values())) == 14
    for name, value in BY_OBP.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_values_are_those_of_the_installed_obp():
    for name, value in by_obp().items():
        assert BY_OBP[name] == pytest.approx(value, rel=1e-10), name
