"""Always-valid intervals: the boundary of the mixture, and coverage however often one analyses."""

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from mmrf_jax.abtest import sequential, statistics
from mmrf_jax.signals import SHORT_VIDEO

#: The integrand is smooth and vanishes at both ends, where the trapezoidal rule is exact to rounding.
EFFECTS = np.linspace(-40.0, 40.0, 8_001)


def boundary(fraction, rho2, alpha=0.05):
    """S / √t at which the mixture of likelihood ratios over effects N(0, ρ²) reaches 1 / α, by quadrature; T = 1."""

    def excess(q):
        s = q * np.sqrt(fraction)
        ratio = np.exp(EFFECTS * s - EFFECTS**2 * fraction / 2) * stats.norm.pdf(EFFECTS, 0, np.sqrt(rho2))
        return np.log(ratio.sum() * (EFFECTS[1] - EFFECTS[0])) + np.log(alpha)

    return optimize.brentq(excess, 0.5, 12)


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_quantile_is_where_the_mixture_rejects(alpha):
    # The boundary is flat about its least: a hundredth of a variance moves it by 10^-6.
    least = {"bounds": (1, 30), "method": "bounded", "options": {"xatol": 0.01}}
    rho2 = optimize.minimize_scalar(lambda r: boundary(1.0, r, alpha), **least).x
    for fraction in (0.05, 0.3, 1.0, 1.5):
        assert sequential.quantile(fraction, alpha) == pytest.approx(boundary(fraction, rho2, alpha), rel=2e-3)
    for rho2 in (4.0, 16.0):  # any other mixture is wider at the end of the plan
        assert sequential.quantile(1.0, alpha) < boundary(1.0, rho2, alpha)


def test_p_value_is_one_over_the_mixture_of_likelihood_ratios():
    # With rho2 of the plan's end, x = fraction * rho2; the p-value is alpha exactly on the boundary.
    rho2 = sequential._mixture(1.0, 0.05)
    for fraction, z in ((0.1, 2.0), (0.7, 3.1), (1.0, -4.0)):

        def ratio(effect, fraction=fraction, z=z):
            s = z * np.sqrt(fraction)
            return np.exp(effect * s - effect**2 * fraction / 2) * stats.norm.pdf(effect, 0, np.sqrt(rho2))

        mixture = integrate.quad(ratio, -60, 60, limit=400, points=[0, z / np.sqrt(fraction)])[0]
        assert sequential.p_value(z, fraction) == pytest.approx(min(1.0, 1.0 / mixture), rel=1e-6)
        for alpha in (0.05, 0.01):
            assert sequential.p_value(sequential.quantile(fraction, alpha), fraction, alpha) == pytest.approx(alpha)
    assert sequential.p_value(0.0, 1.0) == 1.0


def test_quantile_of_a_number_of_looks():
    assert sequential.bonferroni_quantile(1) == pytest.approx(1.959964, abs=1e-6)
    assert sequential.bonferroni_quantile(14) == pytest.approx(stats.norm.ppf(1 - 0.025 / 14))


@pytest.mark.slow
def test_looking_often_keeps_the_coverage_where_a_fixed_interval_loses_it():
    """A/A tests with heavy tails and a ratio metric, looked at 50 times as users come."""
    rng, tests, analyses, users = np.random.default_rng(0), 300, 50, 4000
    held = {"ci95": 0, "always_valid95": 0}
    for _ in range(tests):
        test = statistics.ABTest(SHORT_VIDEO, ("a", "b"), "a", paired=False)
        always = dict.fromkeys(held, True)
        for analysis in range(1, analyses + 1):
            depth = 1 + rng.poisson(5, (2, users // analyses))
            seconds = depth * rng.lognormal(0, 1, depth.shape)
            test.update({arm: {"watch_time": seconds[i], "depth": depth[i]} for i, arm in enumerate("ab")})
            entry = test.ratios(sequential.quantile(analysis / analyses))["b"]["watch_time"]
            for name in held:
                always[name] &= entry[name][0] <= 0 <= entry[name][1]
        for name in held:
            held[name] += always[name]
    assert held["always_valid95"] / tests >= 0.95
    assert held["ci95"] / tests < 0.8


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="fraction 0 must be above 0"):
        sequential.quantile(0)
    with pytest.raises(ValueError, match="0 interim analyses"):
        sequential.bonferroni_quantile(0)
