"""Off-policy estimates against loops written from the definitions, cases by hand, and a bandit whose truth is known."""

import itertools
import json
import math

import jax
import numpy as np
import pytest

from mmrf_jax import ops
from mmrf_jax.abtest import statistics
from mmrf_jax.metrics import ranking
from mmrf_jax.ope import estimators, propensity

CAPS = (0.5, 1.0, 2.0, 10.0, math.inf)
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def stochastic_log_prob(scores, slate):
    """Of the stochastic ranker of any method."""
    return propensity.log_prob(propensity.standardised(scores), slate)


@pytest.fixture
def few(monkeypatch):
    """Cases by hand are of a few users."""
    monkeypatch.setattr(statistics, "MIN_EVENTS", 0)


def random_slates(rng, r, c, k):
    slate = rng.random((r, c)).argsort(1)[:, :k]
    slate[np.arange(k) >= rng.integers(1, k + 1, r)[:, None]] = -1
    return slate


def random_decisions(seed=0, n=60, users=11, signals=2):
    rng = np.random.default_rng(seed)

    def table():
        return rng.normal(size=(n, signals)) ** 2

    return estimators.LoggedDecisions(rng.integers(0, users, n), rng.normal(size=n), table(), table(), table())


def loop_log_prob(scores, slate):
    """Conditional Plackett–Luce log-probabilities of one request, one slot after the other."""
    left, out = list(range(len(scores))), []
    for position in slate:
        if position < 0:
            out.append(0.0)
            continue
        out.append(scores[position] - math.log(sum(math.exp(scores[c]) for c in left)))
        left.remove(position)
    return out


def loop_estimate(rows, cap, signal):
    """Every estimator of one signal, from its definition."""
    number = mass = logged = direct = weighted = errors = 0.0
    weights = []
    for i in range(len(rows.user_id)):
        w, videos, r = (
            math.exp(rows.log_weight[i]),
            1 if rows.videos is None else rows.videos[i],
            rows.reward[i, signal],
        )
        weights.append(w)
        w = min(w, cap)
        number, mass, logged, weighted = number + videos, mass + w * videos, logged + r, weighted + w * r
        direct += rows.direct[i, signal]
        errors += w * (r - rows.predicted[i, signal])
    capped = [min(w, cap) for w in weights]
    return {
        "logged": logged / number,
        "dm": direct / number,
        "ips": weighted / number,
        "ncis": weighted / mass,
        "dr": direct / number + errors / number,
        "mean": sum(capped) / len(capped),
        "ess": sum(capped) ** 2 / sum(w * w for w in capped),
        "capped": sum(w > cap for w in weights) / len(weights),
        "clipped_mass": 1 - sum(capped) / sum(weights),
    }


def take(rows, index):
    def pick(x):
        return None if x is None else x[index]

    return estimators.LoggedDecisions(*(pick(x) for x in vars(rows).values()))


def test_probabilities_agree_with_loops_and_with_the_device():
    rng = np.random.default_rng(0)
    scores, slate, values = rng.normal(0, 2, (40, 7)), random_slates(rng, 40, 7, 4), rng.random((40, 7, 3))
    slate[0] = [3, 1, 0, 2]
    got = propensity.log_prob(scores, slate)
    np.testing.assert_allclose(got, [loop_log_prob(s, a) for s, a in zip(scores, slate, strict=True)], **TIGHT)
    on_device = ops.plackett_luce_log_prob(scores.astype(np.float32), np.maximum(slate, 0), slate >= 0)
    np.testing.assert_allclose(got, on_device, rtol=1e-4, atol=1e-5)
    mean = propensity.expectation(scores, slate, values)
    for i, j in itertools.product(range(40), range(4)):
        left = [c for c in range(7) if c not in slate[i, :j]]
        odds = [math.exp(scores[i, c]) for c in left]
        expected = sum(o * values[i, c] for o, c in zip(odds, left, strict=True)) / sum(odds)
        np.testing.assert_allclose(mean[i, j], expected, **TIGHT)


def test_probabilities_by_hand():
    scores = np.log([[1.0, 2.0, 5.0]])
    got = np.exp(propensity.log_prob(scores, np.array([[2, 0, 1]])))
    np.testing.assert_allclose(got, [[5 / 8, 1 / 3, 1.0]])  # the last is certain
    mean = propensity.expectation(scores, np.array([[2, 0, -1]]), np.array([[[8.0], [16.0], [0.0]]]))
    np.testing.assert_allclose(mean[..., 0], [[5.0, 40 / 3, 16.0]])
    # Scores of standard deviation 1 around 0 are what they are; equal ones are a uniform ranker.
    for library in (propensity, ops):  # in NumPy, and in JAX
        np.testing.assert_allclose(library.standardised(np.array([[1.0, -1.0], [7.0, 7.0]])), [[1, -1], [0, 0]])
    uniform = stochastic_log_prob(np.full((1, 4), 0.1), np.array([[1, 3]]))
    np.testing.assert_allclose(np.exp(uniform), [[1 / 4, 1 / 3]])


def test_the_served_ranker_knows_neither_shift_nor_scale():
    rng = np.random.default_rng(1)
    scores, slate = rng.normal(size=(20, 9)), random_slates(rng, 20, 9, 3)
    got = stochastic_log_prob(scores, slate)
    np.testing.assert_allclose(stochastic_log_prob(1e4 + 300.0 * scores, slate), got, rtol=1e-8)
    np.testing.assert_allclose(propensity.log_prob(scores - 5.0, slate), propensity.log_prob(scores, slate), rtol=1e-9)
    assert not np.allclose(propensity.log_prob(3.0 * scores, slate), propensity.log_prob(scores, slate), rtol=1e-2)


@pytest.mark.parametrize("slates", [False, True])
def test_estimates_agree_with_loops(slates):
    rows = random_decisions()
    if slates:
        rows.videos = np.random.default_rng(5).integers(1, 7, len(rows.user_id))
    got = estimators.estimate(rows, ("a", "b"), CAPS, draws=40)
    assert got["rows"] == 60 and got["users"] == 11
    assert list(got["weights"]) == ["0.5", "1", "2", "10", "inf"]
    for (i, signal), cap in itertools.product(enumerate(("a", "b")), CAPS):
        expected, entry = loop_estimate(rows, cap, i), got["signals"][signal]
        for name in ("logged", "dm"):
            np.testing.assert_allclose(entry[name]["value"], expected[name], **TIGHT)
        for name in ("ips", "ncis", "dr"):
            np.testing.assert_allclose(entry[name][f"{cap:g}"]["value"], expected[name], **TIGHT)
        for name in ("mean", "ess", "capped", "clipped_mass"):
            np.testing.assert_allclose(got["weights"][f"{cap:g}"][name], expected[name], **TIGHT)


def test_intervals_agree_with_a_loop_over_resampled_users(few):
    rows, draws, seed = random_decisions(2), 50, 7
    got = estimators.estimate(rows, ("a", "b"), (2.0,), draws=draws, seed=seed)["signals"]["b"]
    users = np.unique(rows.user_id)
    drawn = np.random.default_rng(seed).integers(0, len(users), (draws, len(users)), dtype=np.int32)
    again = []
    for draw in drawn:
        index = np.concatenate([np.flatnonzero(rows.user_id == users[u]) for u in draw])
        again.append(loop_estimate(take(rows, index), 2.0, 1))
    for name in ("logged", "dm", "ips", "ncis", "dr"):
        entry = got[name] if name in ("logged", "dm") else got[name]["2"]
        low, high = np.quantile([x[name] for x in again], [0.025, 0.975])
        np.testing.assert_allclose(entry["ci95"], [low, high], **TIGHT)
        assert low < entry["value"] < high


@pytest.mark.parametrize("resampled", ["ope", "metrics"])
def test_both_bootstraps_draw_as_many_users_with_replacement(resampled):
    """Sums over n of n users: n means, n covariances of a user; always n users. Two loops, one for few columns."""
    values = np.stack([np.ones(50), *np.random.default_rng(0).gamma(1.0, 1.0, (2, 50))], axis=1)  # [U, M]
    if resampled == "ope":
        sums = estimators.resampled_sums(values, draws=40_000, seed=1)
    else:
        sums = ranking._resampled_sums(values.T, 40_000, np.random.default_rng(1)).T
    assert sums.shape == (40_000, 3) and (sums[:, 0] == 50).all()
    np.testing.assert_allclose(sums.mean(axis=0), values.sum(axis=0), rtol=3e-3)
    np.testing.assert_allclose(np.cov(sums.T), 50 * np.cov(values.T, ddof=0), rtol=0.05, atol=1.0)


def test_estimates_by_hand():
    """Two users; weights 1/2, 2, 4 and rewards 1, 0, 3."""
    rows = estimators.LoggedDecisions(np.array([1, 1, 2]), np.log([0.5, 2.0, 4.0]), np.array([[1.0], [0.0], [3.0]]))
    got = estimators.estimate(rows, ("r",), (2.0, math.inf))
    entry = got["signals"]["r"]
    assert "dm" not in entry and "dr" not in entry
    assert entry["logged"]["value"] == pytest.approx(4 / 3)
    assert entry["ips"]["inf"]["value"] == pytest.approx(12.5 / 3) and entry["ips"]["2"]["value"] == pytest.approx(
        6.5 / 3
    )
    assert entry["ncis"]["inf"]["value"] == pytest.approx(12.5 / 6.5)  # SNIPS
    assert entry["ncis"]["2"]["value"] == pytest.approx(6.5 / 4.5)
    assert got["weights"]["2"] == pytest.approx(
        {"mean": 1.5, "ess": 4.5**2 / 8.25, "capped": 1 / 3, "clipped_mass": 2 / 6.5}
    )


def test_invariances():
    rows = random_decisions(3, n=200, users=40)
    got = estimators.estimate(rows, ("a", "b"), CAPS)["signals"]
    order = np.random.default_rng(0).permutation(200)
    again = estimators.estimate(take(rows, order), ("a", "b"), CAPS)["signals"]
    for estimator, cap in itertools.product(("ips", "ncis", "dr"), ("1", "inf")):
        for key in ("value", "ci95"):
            np.testing.assert_allclose(again["a"][estimator][cap][key], got["a"][estimator][cap][key], **TIGHT)
    scaled = estimators.LoggedDecisions(rows.user_id, rows.log_weight + 3.0, rows.reward)
    scaled = estimators.estimate(scaled, ("a", "b"), CAPS)["signals"]["a"]
    np.testing.assert_allclose(scaled["ncis"]["inf"]["value"], got["a"]["ncis"]["inf"]["value"], **TIGHT)
    np.testing.assert_allclose(scaled["ips"]["inf"]["value"], math.exp(3) * got["a"]["ips"]["inf"]["value"], **TIGHT)
    shifted = estimators.LoggedDecisions(rows.user_id, rows.log_weight, rows.reward + 1.0)
    shifted = estimators.estimate(shifted, ("a", "b"), CAPS)["signals"]["a"]
    np.testing.assert_allclose(shifted["ncis"]["2"]["value"], got["a"]["ncis"]["2"]["value"] + 1.0, **TIGHT)


def test_a_perfect_model_and_the_logging_policy_itself(few):
    rows = random_decisions(4)
    perfect = estimators.LoggedDecisions(rows.user_id, rows.log_weight, rows.reward, rows.reward, rows.direct)
    entry = estimators.estimate(perfect, ("a", "b"), CAPS)["signals"]["a"]
    for cap in entry["dr"]:
        np.testing.assert_allclose(entry["dr"][cap]["value"], entry["dm"]["value"], **TIGHT)
        np.testing.assert_allclose(entry["dr"][cap]["ci95"], entry["dm"]["ci95"], **TIGHT)
    itself = estimators.LoggedDecisions(rows.user_id, np.zeros(60), rows.reward)
    got = estimators.estimate(itself, ("a", "b"), (1.0, math.inf))
    for estimator, cap in itertools.product(("ips", "ncis"), ("1", "inf")):
        entry = got["signals"]["a"]
        assert jax.tree.leaves(entry[estimator][cap]) == pytest.approx(jax.tree.leaves(entry["logged"]))
    assert got["weights"]["1"] == pytest.approx({"mean": 1.0, "ess": 60.0, "capped": 0.0, "clipped_mass": 0.0})


class Bandit:
    """Four kinds of users, six candidates, slates of two; chances of a click depend on kind, video and slot."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.click = rng.uniform(0.05, 0.9, (4, 6))
        self.fade = np.array([1.0, 0.7])  # of the second slot
        self.behaviour = rng.normal(0, 1.0, (4, 6))
        self.target = propensity.standardised(self.behaviour + rng.normal(0, 1.0, (4, 6)))

    def log(self, rng, users, requests=3):
        kind = np.repeat(rng.integers(0, 4, users), requests)
        slate = np.argsort(-(self.behaviour[kind] + rng.gumbel(size=(len(kind), 6))), axis=1)[:, :2]
        click = rng.random(slate.shape) < np.take_along_axis(self.click[kind], slate, 1) * self.fade
        return np.repeat(np.arange(users), requests), kind, slate, click.astype(float)

    def truth(self):
        """States, and videos above, of the behaviour policy; actions of the target."""
        total = 0.0
        for kind in range(4):
            behaviour, target = np.exp(self.behaviour[kind]), np.exp(self.target[kind])
            total += (target / target.sum()) @ self.click[kind] / 8
            for first in range(6):
                left = [c for c in range(6) if c != first]
                second = target[left] @ self.click[kind, left] / target[left].sum()
                total += behaviour[first] / behaviour.sum() * second * self.fade[1] / 8
        return total

    def decisions(self, log, predicted):
        user, kind, slate, click = log
        ratio = propensity.log_ratio(
            propensity.log_prob(self.target[kind], slate), propensity.log_prob(self.behaviour[kind], slate)
        )
        values = predicted[kind][..., None]  # [r, C, 1]
        direct = propensity.expectation(self.target[kind], slate, values) * self.fade[:, None]
        shown = np.take_along_axis(predicted[kind], slate, 1) * self.fade
        return estimators.LoggedDecisions(
            np.repeat(user, 2), ratio.ravel(), click.reshape(-1, 1), shown.reshape(-1, 1), direct.reshape(-1, 1)
        )


def test_intervals_cover_the_truth_of_a_bandit():
    bandit = Bandit()
    truth, wrong = bandit.truth(), np.full((4, 6), 0.3)
    inside: dict[str, list[bool]] = {}
    means: dict[str, list[float]] = {}
    for replicate in range(200):
        rows = bandit.decisions(bandit.log(np.random.default_rng(replicate), 300), wrong)
        found = estimators.estimate(rows, ("click",), (math.inf,), draws=400, seed=replicate)["signals"]["click"]
        for name in ("logged", "dm", "ips", "ncis", "dr"):
            entry = found[name] if name in ("logged", "dm") else found[name]["inf"]
            inside.setdefault(name, []).append(entry["ci95"][0] <= truth <= entry["ci95"][1])
            means.setdefault(name, []).append(entry["value"])
    for name in ("ips", "ncis", "dr"):
        assert 0.90 <= np.mean(inside[name]) <= 0.98, name
        error = np.std(means[name]) / math.sqrt(200)
        assert abs(np.mean(means[name]) - truth) < 4 * error + 0.002, name
    # What is not corrected misses it: the log's own mean, and the model that knows nothing.
    assert np.mean(inside["logged"]) < 0.5 and np.mean(inside["dm"]) < 0.5
    assert np.std(means["dr"]) < np.std(means["ips"])


def test_the_direct_method_of_the_true_model_is_the_truth_on_average():
    bandit = Bandit(1)
    rows = bandit.decisions(bandit.log(np.random.default_rng(0), 20_000), bandit.click)
    entry = estimators.estimate(rows, ("click",), (1.0,), draws=200)["signals"]["click"]["dm"]
    assert entry["value"] == pytest.approx(bandit.truth(), abs=0.003)
    assert entry["ci95"][0] < bandit.truth() < entry["ci95"][1]


def loop_per_decision(lengths, log_weight, reward, discount, cap):
    """Both estimators from their definitions: dictionaries of time, the weights of finished sessions staying."""
    longest, plain, row = max(lengths), 0.0, 0
    top, bottom = [0.0] * longest, [0.0] * longest
    for length in lengths:
        product = 1.0
        for t in range(longest):
            if t < length:
                product *= math.exp(log_weight[row])
                plain += discount**t * min(cap, product) * reward[row]
                top[t] += min(cap, product) * reward[row]
                row += 1
            bottom[t] += min(cap, product)
    return plain / len(lengths), sum(discount**t * a / b for t, (a, b) in enumerate(zip(top, bottom, strict=True)))


def test_sessions_agree_with_loops(few):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 25)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    log_weight, reward = rng.normal(0, 0.5, offsets[-1]), rng.random((offsets[-1], 2))
    user = rng.integers(0, 9, 25)
    got = estimators.per_decision(user, offsets, log_weight, reward, 0.9, ("a", "b"), CAPS, draws=30)
    assert got["rows"] == 25 and got["users"] == len(np.unique(user))
    for (i, signal), cap in itertools.product(enumerate(("a", "b")), CAPS):
        plain, normalised = loop_per_decision(lengths, log_weight, reward[:, i], 0.9, cap)
        entry = got["signals"][signal]
        np.testing.assert_allclose(entry["ips"][f"{cap:g}"]["value"], plain, **TIGHT)
        np.testing.assert_allclose(entry["ncis"][f"{cap:g}"]["value"], normalised, **TIGHT)
        low, high = entry["ncis"][f"{cap:g}"]["ci95"]
        assert low < normalised < high
    same = loop_per_decision(lengths, np.zeros_like(log_weight), reward[:, 0], 0.9, math.inf)[0]
    np.testing.assert_allclose(got["signals"]["a"]["logged"]["value"], same, **TIGHT)


def test_sessions_of_one_request_are_slates(few):
    rows = random_decisions(6)
    got = estimators.per_decision(rows.user_id, np.arange(61), rows.log_weight, rows.reward, 0.5, ("a", "b"), CAPS)
    rows = estimators.LoggedDecisions(rows.user_id, rows.log_weight, rows.reward)
    expected = estimators.estimate(rows, ("a", "b"), CAPS)
    assert jax.tree.leaves(got["weights"]) == pytest.approx(jax.tree.leaves(expected["weights"]))
    for estimator, cap in itertools.product(("ips", "ncis"), ("1", "inf")):
        for key in ("value", "ci95"):
            a, b = (x["signals"]["b"][estimator][cap][key] for x in (got, expected))
            np.testing.assert_allclose(a, b, **TIGHT)


def test_sessions_in_which_an_action_moves_the_state():
    """Two videos, K = 1: the first keeps the user with .9, the second with .2; each request is worth 1."""
    rng = np.random.default_rng(0)
    behaviour, target, stay = np.array([0.5, 0.5]), np.array([0.8, 0.2]), np.array([0.9, 0.2])
    lengths, weights = [], []
    for _ in range(4_000):
        length, going = 0, True
        while going and length < 4:
            action = int(rng.random() < behaviour[1])
            weights.append(math.log(target[action] / behaviour[action]))
            going = rng.random() < stay[action]
            length += 1
        lengths.append(length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    got = estimators.per_decision(np.arange(4_000), offsets, weights, np.ones((offsets[-1], 1)), 1.0, ("n",), draws=300)
    truth = sum((target @ stay) ** t for t in range(4))
    entry = got["signals"]["n"]
    assert entry["logged"]["value"] == pytest.approx(sum((behaviour @ stay) ** t for t in range(4)), abs=0.05)
    for estimator in ("ips", "ncis"):
        low, high = entry[estimator]["inf"]["ci95"]
        assert low < truth < high and high - low < 0.3


@pytest.mark.parametrize("users", [0, 24, 25])
def test_intervals_that_events_cannot_carry_are_none_with_a_reason(users):
    """Of a signal that so many users have; its direct estimate, of a model, counts no events."""
    n = 200
    reward = np.stack([np.arange(n) < users, np.ones(n)], axis=1) * 1.0
    rows = estimators.LoggedDecisions(np.arange(n), np.zeros(n), reward, reward + 0.1, reward + 0.1)
    result = estimators.estimate(rows, ("rare", "often"), draws=50)
    sessions = estimators.per_decision(
        np.arange(n // 2), 2 * np.arange(n // 2 + 1), np.zeros(n), reward, 0.9, ("rare", "often"), draws=50
    )
    assert json.loads(json.dumps([result, sessions], allow_nan=False)) == [result, sessions]
    text = estimators.format_estimates({"video": result, "session": sessions})
    for part, there in ((result, users), (sessions, -(-users // 2))):
        for estimator in ("logged", "ips", "ncis", "dr") if part is result else ("logged", "ips", "ncis"):
            for signal in ("rare", "often"):
                entry = part["signals"][signal][estimator]
                entry = entry if estimator == "logged" else entry["10"]
                if signal == "rare" and there < 25:
                    assert entry["ci95"] is None
                    assert entry["note"] == f"too few: {there} users of the log have any, an interval needs 25"
                else:
                    assert len(entry["ci95"]) == 2 and "note" not in entry
    assert result["signals"]["rare"]["dm"]["ci95"] is not None and ("too few" in text)


def test_table_names_units_caps_and_signals(few):
    rows = random_decisions()
    units = {"video": estimators.estimate(rows, ("a", "b"))}
    units["slate"] = estimators.estimate(
        estimators.LoggedDecisions(rows.user_id, rows.log_weight, rows.reward), ("a", "b")
    )
    weights, values = estimators.format_estimates(units).split("\n\n")
    assert len(weights.splitlines()) == 2 + 2 * 7 and len(values.splitlines()) == 2 + 2 * 2
    assert values.splitlines()[0].endswith("NCIS, cap 50 | NCIS, cap inf |")
    entry = units["video"]["signals"]["b"]
    for x in (entry["dm"], entry["dr"]["10"], entry["ncis"]["inf"]):
        assert f"{x['value']:.4g} [{x['ci95'][0]:.4g}, {x['ci95'][1]:.4g}]" in values.splitlines()[3]
    assert "| – | – |" in values.splitlines()[4]  # no model, no DM and DR
    entry = units["video"]["weights"]["2"]
    assert f"| video | 60 | 11 | 2 | {entry['mean']:.3f} | {entry['ess']:.1f} |" in weights


def refusals():
    def good(**x):
        return estimators.LoggedDecisions(
            **({"user_id": np.arange(3), "log_weight": np.zeros(3), "reward": np.ones((3, 1))} | x)
        )

    ones = np.ones((3, 1))
    yield lambda: good(log_weight=np.zeros(2)), r"log_weight has shape \(2,\), expected \(3,\)"
    yield lambda: good(reward=np.ones(3)), r"reward has shape \(3,\), expected \[n, S\]"
    yield lambda: good(predicted=ones), "only one is given; give both"
    yield lambda: good(log_weight=np.array([0, np.nan, 0])), "log_weight of row 1 is nan; leave out"
    yield lambda: estimators.estimate(good(), ("r",), (0.0,)), r"caps \(0.0,\) must be positive"
    yield lambda: estimators.estimate(good(), ("r", "q")), "2 names for 1 signals"
    yield (
        lambda: propensity.log_ratio(np.zeros(2), np.array([0.0, -np.inf])),
        "row 1 is exp.-inf., .*leave such rows out",
    )
    yield lambda: propensity.log_ratio(np.zeros(2), np.array([0.1, 0.0])), "row 0 is exp.0.1., and no probability in"
    yield lambda: propensity.log_ratio(np.zeros(2), np.zeros(3)), r"\(2,\) and log-propensities \(3,\)"
    yield lambda: propensity.log_prob(np.zeros((2, 3)), np.array([[0], [3]])), r"positions in \[0, 3\], .* 3 candidates"
    yield lambda: propensity.log_prob(np.zeros((2, 3)), np.zeros((1, 1), int)), r"scores \(2, 3\) and slates \(1, 1\)"
    yield lambda: propensity.log_prob(np.full((1, 2), np.nan), np.zeros((1, 1), int)), "2 scores are not finite"
    yield (
        lambda: estimators.per_decision(np.arange(2), np.array([0, 0, 3]), np.zeros(3), ones, 0.9, ("r",)),
        "each of 2 sessions at least one request",
    )


@pytest.mark.parametrize(("call", "message"), list(refusals()))
def test_refusals_name_the_thing_and_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
