"""The world keeps the environments' contract, and has none of the bugs that simulators have without a word."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrf_jax import ops, random, types
from mmrf_jax.envs import rankers, rollout
from mmrf_jax.envs.short_video import env, items, leaving, parameters, reference_policies, response, users
from mmrf_jax.signals import SHORT_VIDEO

TINY = parameters.WorldConfig(num_videos=3000, candidates=20, slate=3, history=8, max_requests=6)
B, K = 256, TINY.slate
WIDE = parameters.WorldConfig(num_videos=20_000)

reset = jax.jit(env.reset)
step = jax.jit(env.step)
next_visit = jax.jit(leaving.next_visit)
draw = jax.jit(users.draw)
affinity = jax.jit(response.affinity)
respond = jax.jit(response.respond)
expected_watch = jax.jit(response.expected_watch)
continue_logit = jax.jit(leaving.continue_logit)
production, oracle_myopic, oracle_planning = (
    jax.jit(getattr(reference_policies, name)) for name in ("production", "oracle_myopic", "oracle_planning")
)


@pytest.fixture(scope="module")
def sim():
    return env.make_world(TINY)


@pytest.fixture(scope="module")
def wide():
    return env.make_world(WIDE)


@pytest.fixture(scope="module")
def whole():
    return env.make_world(parameters.WorldConfig(num_videos=40, candidates=40, slate=3, history=30))


@functools.cache
def upload_days(config):
    """Day of upload [V] in order of id, from the draw itself: rows are matched by their hidden truth."""
    arrays = items._draw(config.seed, config.num_videos)
    params = items.make_world_params(config)
    drawn, kept = np.asarray(arrays["hidden"]), np.asarray(params.hidden)
    order, place = np.lexsort(drawn.T), np.lexsort(kept.T)
    np.testing.assert_array_equal(drawn[order], kept[place])
    days = np.empty(config.num_videos, int)
    days[place] = np.asarray(arrays["upload"])[order]
    return days


def first_slate(num_users=B):
    return jnp.broadcast_to(jnp.arange(K), (num_users, K))


def with_behaviour(params, **changes):
    return params.replace(behaviour=params.behaviour.replace(**changes))


def play(params, key, user_ids, day=0, steps=3):
    """A few requests answered with the first K candidates: requests, history and results, stacked over steps."""
    request, history, state = reset(key, params, user_ids, day)
    seen = []
    for _ in range(steps):
        result, state = step(key, state, first_slate(len(user_ids)), params)
        seen.append((request, result))
        request = result.request
    days = next_visit(key, state, params)
    seen, history, days = jax.device_get((seen, history, days))
    return jax.tree.map(lambda *x: np.stack(x, axis=1), *seen), history, days


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=1e-5, atol=1e-5)


class TestContract:
    def test_shapes(self, sim):
        c, h, s = TINY.candidates, TINY.history, len(SHORT_VIDEO)
        request, history, state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 3)
        result, next_state = step(jax.random.key(0), state, first_slate(), sim.default_params)
        for asked in (request, result.request):
            assert asked.user_id.shape == (B,) and asked.profile.shape == (B, parameters.PROFILE)
            assert asked.context.shape == (B, parameters.CONTEXT)
            assert asked.candidates.shape == (B, c) and asked.candidates.dtype == jnp.int32
        assert history.videos.shape == (B, h) and history.feedback.shape == (B, h, s) and history.mask.all()
        assert result.exposure.videos.shape == (B, K) and result.exposure.feedback.shape == (B, K, s)
        np.testing.assert_array_equal(result.exposure.videos, request.candidates[:, :K])
        for flag in (result.terminated, result.truncated):
            assert flag.shape == (B,) and flag.dtype == bool
        assert jax.tree.structure(state) == jax.tree.structure(next_state)
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(next_state), strict=True):
            assert before.shape == after.shape and before.dtype == after.dtype
        assert sim.items.features.shape == (TINY.num_videos, parameters.LATENT + 8)
        assert sim.items.author.min() >= 0 and sim.items.author.max() < sim.items.num_authors
        assert sim.items.tag.min() >= 0 and sim.items.tag.max() < sim.items.num_tags
        np.testing.assert_allclose(sim.items.features.std(axis=0), 1.0, atol=0.9)

    def test_nothing_but_the_arguments_matters(self, sim):
        key, ids = jax.random.key(5), jnp.arange(B)
        assert_same(play(sim.default_params, key, ids), play(sim.default_params, key, ids))
        one, two = play(sim.default_params, key, ids), play(sim.default_params, jax.random.key(6), ids)
        assert (one[0][0].candidates != two[0][0].candidates).mean() > 0.5
        assert (one[0][1].exposure.feedback != two[0][1].exposure.feedback).any(axis=(1, 2, 3)).mean() > 0.9
        np.testing.assert_array_equal(one[0][0].profile, two[0][0].profile)  # who a user is does not hang on the key

    def test_order_split_and_slot_do_not_matter(self, sim):
        key, ids = jax.random.key(1), jnp.arange(1000, 1000 + B)
        expected = play(sim.default_params, key, ids)
        shuffle = np.random.default_rng(0).permutation(B)
        assert_same(play(sim.default_params, key, ids[shuffle]), jax.tree.map(lambda x: x[shuffle], expected))
        strangers = jnp.concatenate([ids[B // 2 :], jnp.arange(B // 2)])  # half of them, in other slots

        def half(x, part):
            return jax.tree.map(lambda leaf: leaf[part], x)

        mixed = play(sim.default_params, key, strangers)
        assert_same(half(mixed, slice(B // 2)), half(expected, slice(B // 2, B)))
        few = play(sim.default_params, key, ids[:8])
        assert_same(few, half(expected, slice(8)))

    def test_users_steps_and_days_draw_their_own_numbers(self, sim):
        key = jax.random.key(2)

        def u(position, users):
            return random.reference_per_user_uniform(key, position, users, 50)

        numbers = np.stack([u(0, jnp.arange(40)), u(1, jnp.arange(40)), u(0, jnp.arange(40, 80))])
        assert len(np.unique(numbers)) == numbers.size and numbers.min() > 0 and numbers.max() < 1
        np.testing.assert_array_equal(
            u(jnp.array([1, 0]), jnp.array([7, 7]))[::-1], u(jnp.arange(2), jnp.array([7, 7]))
        )
        monday, tuesday = (reset(key, sim.default_params, jnp.arange(B), day)[0].candidates for day in (0, 1))
        assert (monday != tuesday).any(axis=1).mean() > 0.95

    def test_requests_for_random_slates_are_marked_and_nothing_else_changes(self, sim):
        key, ids, share = jax.random.key(3), jnp.arange(B), 0.3
        (asked, results), *rest = play(sim.default_params, key, ids)
        (marked, after), *others = play(sim.with_random_share(share).default_params, key, ids)
        assert_same(marked.replace(context=marked.context[..., 1:]), asked)
        assert_same(after.replace(request=results.request), results)
        assert_same(others, rest)
        flag = np.asarray(marked.context[..., 0])
        np.testing.assert_array_equal(flag, types.exposed_at_random(marked.context))
        assert abs(flag.mean() - share) < 5 * np.sqrt(share * (1 - share) / flag.size)
        both = flag[:, 0] * flag[:, 1]  # drawn anew at each request
        assert abs(both.mean() - share**2) < 5 * np.sqrt(share**2 / len(both))

    def test_marked_requests_get_random_slates(self):
        """Scores by the temperature of the policy, and equal ones where the request is marked."""
        request = types.Request(
            jnp.arange(2), jnp.zeros((2, 1)), jnp.array([[0.0, 0.7], [1.0, 0.7]]), jnp.zeros((2, 3))
        )
        score = jnp.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
        for temperature, expected in ((2.0, [0.5, 1.0, 2.0]), (0.0, [1e6, 2e6, 4e6])):
            inner = rankers.PrivilegedPolicy(lambda params, state: score, temperature)
            policy = rankers.WithRandomExposures(inner)
            assert policy.temperature == 1.0
            np.testing.assert_allclose(policy.scores(None, None, (), request), [expected, [0.0, 0.0, 0.0]])

    def test_transforms(self):
        u = np.random.default_rng(0).uniform(size=200_000).astype(np.float32)
        normal, gumbel = np.asarray(random.to_normal(u)), np.asarray(random.to_gumbel(u))
        np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=0.01)
        np.testing.assert_allclose([gumbel.mean(), gumbel.std()], [0.5772, np.pi / 6**0.5], atol=0.02)
        edge = jnp.array([1e-7, 1.0 - 6e-8])
        assert jnp.isfinite(random.to_normal(edge)).all() and jnp.isfinite(random.to_gumbel(edge)).all()


class TestCandidates:
    @pytest.mark.parametrize("day", [0, 17, 60, 75])
    def test_composition(self, wide, day):
        """60 near the user, 30 popular, 10 new; all different and uploaded. After LAST_DAY nothing changes."""
        request, _, state = reset(jax.random.key(day), wide.default_params, jnp.arange(B), day)
        candidates, c = np.asarray(request.candidates), WIDE.candidates
        assert candidates.min() >= 0 and candidates.max() < WIDE.num_videos
        assert all(len(set(row)) == c for row in candidates)
        age = min(day, parameters.LAST_DAY) - upload_days(WIDE)[candidates]
        assert age.min() >= 0
        num_popular = int(wide.default_params.popular_edges[-1])
        popular, new = candidates < num_popular, age < 3
        np.testing.assert_array_equal(new.sum(axis=1), 10)
        np.testing.assert_array_equal(popular.sum(axis=1), 30)
        topics = np.asarray(wide.default_params.topic)[candidates]
        near = ~popular & ~new
        assert {len(set(t[n])) for t, n in zip(topics, near, strict=True)} == {6}
        fit = np.asarray(state.interest @ wide.default_params.centroids.T)
        fit = np.take_along_axis(fit, topics, axis=1)
        assert fit[near].mean() > fit[popular].mean() + 0.3

    def test_popular_ones_follow_zipf(self, wide):
        request = reset(jax.random.key(0), wide.default_params, jnp.arange(B), 0)[0]
        candidates = np.asarray(request.candidates)
        num_popular = int(wide.default_params.popular_edges[-1])
        counts = np.bincount(candidates[candidates < num_popular], minlength=num_popular)
        top, tail = counts[:20].mean(), counts[num_popular // 2 :].mean()
        assert top > 10 * tail > 0
        # The most popular first: ranked by the column of popularity that the platform sees.
        popularity = np.asarray(wide.items.features)[:num_popular, -1]
        assert (np.diff(popularity) <= 0).all()

    def test_new_videos_arrive(self, wide):
        days = upload_days(WIDE)
        newest = []
        for day in (0, 20, 40):
            candidates = np.asarray(reset(jax.random.key(0), wide.default_params, jnp.arange(B), day)[0].candidates)
            newest.append(set(candidates[days[candidates] > day - 3]))
            assert days[candidates].max() == day
        assert not set.union(*newest[1:]) & newest[0]

    def test_every_request_brings_others(self, sim):
        (request, _), _, _ = play(sim.default_params, jax.random.key(0), jnp.arange(B))
        candidates = np.asarray(request.candidates)  # [B, 3, C]
        assert (candidates[:, 0] != candidates[:, 1]).any(axis=1).all()
        assert all(len(set(row)) == TINY.candidates for row in candidates.reshape(-1, TINY.candidates))

    def test_whole_catalogue(self, whole):
        request, history, _ = reset(jax.random.key(0), whole.default_params, jnp.arange(B), 0)
        np.testing.assert_array_equal(request.candidates, np.broadcast_to(np.arange(40), (B, 40)))
        # A catalogue this small has topics without videos; the histories name none that is not there.
        assert history.videos.min() >= 0 and history.videos.max() < 40
        assert (upload_days(whole.default_params.config)[np.asarray(history.videos)] <= 0).all()

    def test_slates_have_no_repeats(self, sim):
        """Sampled, best and all-ties slates of K = 7, as videos."""
        both = (reference_policies.production, reference_policies.random)
        act = jax.jit(rollout.select_slate, static_argnames="k")
        request, _, state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 0)
        for ranker, temperature in itertools.product(both, (1.0, 0.0)):
            policy = rankers.PrivilegedPolicy(ranker, temperature)
            _, slate, _ = act(
                policy, sim.default_params, state, (), request, request.user_id, 0, jax.random.key(1), k=7
            )
            videos = np.sort(np.take_along_axis(np.asarray(request.candidates), np.asarray(slate), axis=1), axis=1)
            assert (np.diff(videos, axis=1) > 0).all()


@pytest.fixture(scope="module")
def answered(sim):
    """A hundred thousand answers by users whose every explicit signal is common, and what is behind them."""
    params = with_behaviour(
        sim.default_params,
        like=(0.5, 0.8, 0.0, 0.0, 0.0, -2.2),
        follow=(-1.5, 0.8, 0.1, 0.1, 0.0, -0.5),
        comment=(-2.5, 0.2, 1.0, 0.6, 0.0, -1.5),
        forward=(-3.0, 0.6, 0.0, 0.0, 0.2, -0.8),
        hate=(-1.0, -0.7, 0.0, 0.5, 0.9, 0.0),
        profile_enter=(0.0, 0.5, 0.2, -0.2, 0.0, 1.0),
    )
    traits, interest = draw(jnp.arange(40_000), params)
    fresh = jnp.zeros((40_000, parameters.TOPICS))
    videos = jax.random.randint(jax.random.key(1), (40_000, K), 0, TINY.num_videos)
    truth = affinity(params, traits, interest, fresh, videos)
    u = jax.random.uniform(jax.random.key(2), (40_000, K, response.NUM_UNIFORMS), minval=1e-7)
    feedback = respond(params, traits, truth, u)
    return params, traits, truth, {s: np.asarray(feedback[..., i]) for i, s in enumerate(SHORT_VIDEO.names)}


class TestFeedback:
    def test_click_and_long_view_by_hand(self):
        # 5 s, unfinished and finished; a minute, at 7 s sharp, just above, at 18 s, just below; 10 s and 7 s, finished
        seconds = jnp.array([4.9, 5.0, 7.0, 7.1, 18.0, 17.9, 10.0, 7.0])
        duration = jnp.array([5.0, 5.0, 60.0, 60.0, 60.0, 60.0, 10.0, 7.0])
        click, long_view = response.watch_rules(seconds, duration)
        np.testing.assert_array_equal(click, [0, 1, 0, 1, 1, 1, 1, 1])
        np.testing.assert_array_equal(long_view, [0, 1, 0, 0, 1, 0, 1, 1])

    def test_watch_columns_are_where_they_belong(self, answered):
        _, _, truth, feedback = answered
        seconds, duration = feedback["watch_time"], np.asarray(truth.duration)
        np.testing.assert_array_equal(
            feedback["click"], np.where(duration <= 7, seconds >= duration, seconds > 7).astype(np.float32)
        )
        np.testing.assert_array_equal(feedback["long_view"], seconds >= np.minimum(duration, 18))
        assert (seconds > 0).all() and (seconds <= 2 * duration * (1 + 1e-6)).all()
        assert 0 < (seconds > duration * 1.01).mean() < 0.08  # replays

    def test_every_explicit_signal_has_its_own_rate(self, answered):
        """Means equal those of the sigmoid of each signal's log-odds, written out here, once and in its column."""
        params, traits, truth, feedback = answered
        x = {f: np.asarray(getattr(truth, f), np.float64) for f in ("enjoyment", "match", "clickbait", "appeal")}
        sociability = np.asarray(traits.sociability, np.float64)[:, None]
        rates, rest = {}, {}
        for name in response.EXPLICIT:
            intercept, enjoyment, match, watched, bait, unclicked = getattr(params.behaviour, name)
            logit = intercept + enjoyment * x["enjoyment"] + match * x["match"] + bait * x["clickbait"]
            logit = logit + watched * np.log1p(feedback["watch_time"]) + unclicked * (1 - feedback["click"])
            logit = logit + (0.0 if name == "hate" else 0.4) * sociability
            logit = logit + (0.4 * x["appeal"] if name in ("follow", "profile_enter") else 0.0)
            probability = 1 / (1 + np.exp(-logit))
            rates[name], rest[name] = probability.mean(), feedback[name] - probability
            error = np.sqrt((probability * (1 - probability)).sum()) / probability.size
            assert abs(feedback[name].mean(dtype=np.float64) - rates[name]) < 4 * error, name
            assert set(np.unique(feedback[name])) == {0.0, 1.0}
        assert np.diff(sorted(rates.values())).min() > 0.02, f"rates too alike to tell columns apart: {rates}"
        # Given the watching, signals are drawn independently: no two share a random number.
        correlation = np.corrcoef([r.ravel() for r in rest.values()])
        assert np.abs(correlation - np.eye(len(rest))).max() < 0.015

    def test_expected_watch_is_the_mean_of_what_is_watched(self, answered):
        params, _, truth, feedback = answered
        expected = np.asarray(expected_watch(params, truth))[:, 0]  # at the first position
        np.testing.assert_allclose(feedback["watch_time"][:, 0].mean(), expected.mean(), rtol=0.03)
        top = expected > np.quantile(expected, 0.9)
        np.testing.assert_allclose(feedback["watch_time"][top, 0].mean(), expected[top].mean(), rtol=0.05)

    def test_clickbait_is_watched_but_not_liked(self, answered):
        _, _, truth, feedback = answered
        bait = np.asarray(truth.clickbait)
        high, low = bait > np.quantile(bait, 0.8), bait < np.quantile(bait, 0.2)
        assert feedback["watch_time"][high].mean() > 1.2 * feedback["watch_time"][low].mean()
        assert feedback["like"][high].mean() < feedback["like"][low].mean()
        assert feedback["hate"][high].mean() > feedback["hate"][low].mean()

    def test_later_positions_are_watched_less(self, sim):
        """The same video and the same numbers at every position."""
        traits, interest = draw(jnp.arange(B), sim.default_params)
        videos = jnp.broadcast_to(jnp.arange(B)[:, None], (B, 6))
        truth = affinity(sim.default_params, traits, interest, jnp.zeros((B, parameters.TOPICS)), videos)
        u = jnp.broadcast_to(
            jax.random.uniform(jax.random.key(3), (B, 1, response.NUM_UNIFORMS)), (B, 6, response.NUM_UNIFORMS)
        )
        seconds = np.asarray(respond(sim.default_params, traits, truth, u)[..., SHORT_VIDEO.index("watch_time")])
        assert (np.diff(seconds, axis=1) <= 1e-5).all() and seconds[:, -1].mean() < 0.97 * seconds[:, 0].mean()
        flat = with_behaviour(sim.default_params, engagement_position=0.0)
        seconds = np.asarray(respond(flat, traits, truth, u)[..., SHORT_VIDEO.index("watch_time")])
        np.testing.assert_array_equal(seconds, np.broadcast_to(seconds[:, :1], seconds.shape))

    def test_arriving_history_is_plausible(self, wide):
        """Better than uniform exposure, as a ranked feed is; by the click rule; about the user; from the past."""
        params = wide.default_params
        _, history, state = reset(jax.random.key(0), params, jnp.arange(B), 10)
        videos = np.asarray(history.videos)
        assert (upload_days(WIDE)[videos] <= 0).all()
        feedback = dict(zip(SHORT_VIDEO.names, np.moveaxis(np.asarray(history.feedback), -1, 0), strict=True))
        assert 0.3 < feedback["click"].mean() < 0.6 and 0.2 < feedback["long_view"].mean() < 0.45
        assert 0.005 < feedback["like"].mean() < 0.05 and 10 < feedback["watch_time"].mean() < 35
        duration = np.asarray(wide.items.duration)[videos]
        np.testing.assert_array_equal(feedback["long_view"], feedback["watch_time"] >= np.minimum(duration, 18))
        taste = np.asarray(params.hidden)[videos, : parameters.LATENT]
        fit = np.einsum("bhd,bd->bh", taste, np.asarray(state.interest))
        assert fit.mean() > 0.25 and fit[feedback["long_view"] > 0].mean() > fit[feedback["long_view"] == 0].mean()


class TestSession:
    def test_continue_logit_by_hand(self, sim):
        b = sim.default_params.behaviour
        state = reset(jax.random.key(0), sim.default_params, jnp.arange(4), 0)[2]
        state = state.replace(position=jnp.array([0, 1, 5, 10]))
        enjoyment = jnp.array([[1.0, 1.0], [0.0, 2.0], [3.0, 1.0], [-1.0, -1.0]])
        expected = (
            b.continue_logit
            + b.continue_enjoyment * (enjoyment.mean(axis=1) - b.enjoyment_centre)
            + b.continue_patience * state.traits.patience
        )
        expected -= b.continue_fatigue * jnp.array([0, 1, 5, 10])
        np.testing.assert_allclose(continue_logit(sim.default_params, state, enjoyment), expected, rtol=1e-6)

    def flags(self, params, steps=TINY.max_requests):
        _, result = play(params, jax.random.key(0), jnp.arange(B), steps=steps)[0]
        return np.asarray(result.terminated), np.asarray(result.truncated)  # [B, steps]

    def test_terminated_is_not_truncated(self, sim):
        """Those who stay are cut at T_max, and only there; who left at that very request is not cut."""
        terminated, truncated = self.flags(sim.default_params)
        assert not (terminated & truncated).any()
        assert not truncated[:, :-1].any()
        np.testing.assert_array_equal(truncated[:, -1], ~terminated[:, -1])
        assert 0 < terminated.mean() < 0.5 and terminated[:, -1].any()

    def test_faithful_users_are_cut(self, sim):
        terminated, truncated = self.flags(with_behaviour(sim.default_params, continue_logit=100.0))
        assert not terminated.any() and truncated[:, -1].all() and not truncated[:, :-1].any()

    def test_bored_users_leave_at_once(self, sim):
        terminated, truncated = self.flags(with_behaviour(sim.default_params, continue_logit=-100.0), steps=1)
        assert terminated.all() and not truncated.any()

    def test_leaving_follows_the_log_odds(self, sim):
        keys = jax.random.split(jax.random.key(0), 16)
        _, _, state = reset(keys[0], sim.default_params, jnp.arange(B), 0)
        videos = state.candidates[:, :K]
        enjoyment = affinity(sim.default_params, state.traits, state.interest, state.satiation, videos).enjoyment
        logit = np.asarray(continue_logit(sim.default_params, state, enjoyment))
        leaves = [step(key, state, first_slate(), sim.default_params)[0].terminated for key in keys]
        stays = 1.0 - np.mean(leaves, axis=0)
        probability = 1 / (1 + np.exp(-logit))
        for part in (logit <= np.median(logit), logit > np.median(logit)):
            error = np.sqrt((probability * (1 - probability))[part].sum() / len(keys)) / part.sum()
            assert abs(stays[part].mean() - probability[part].mean()) < 4 * error

    def test_interests_drift_to_what_is_watched(self, sim):
        _, _, state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 0)
        result, after = step(jax.random.key(0), state, first_slate(), sim.default_params)
        np.testing.assert_allclose(np.linalg.norm(after.interest, axis=1), 1.0, atol=1e-5)
        seconds = np.asarray(result.exposure.feedback[..., SHORT_VIDEO.index("watch_time")])
        taste = np.asarray(sim.default_params.hidden)[np.asarray(result.exposure.videos), : parameters.LATENT]
        moved = np.asarray(after.interest - state.interest)
        drift = sim.default_params.behaviour.drift
        home = np.asarray(state.interest)
        expected = home + drift * np.einsum("bk,bkd->bd", seconds / (seconds + 20.0), taste)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(after.interest, expected, atol=1e-5)
        watched_taste = np.einsum("bk,bkd->bd", seconds / (seconds + 20.0), taste)
        assert ((moved * watched_taste).sum(axis=1) >= -1e-6).all()
        much = seconds.sum(axis=1) > np.median(seconds.sum(axis=1))
        assert np.linalg.norm(moved[much], axis=1).mean() > 2 * np.linalg.norm(moved[~much], axis=1).mean()

    def test_repeated_topics_satiate(self, sim):
        b = sim.default_params.behaviour
        _, _, state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 0)
        topics = np.asarray(sim.default_params.topic)[np.asarray(state.candidates[:, :K])]
        _, once = step(jax.random.key(0), state, first_slate(), sim.default_params)
        expected = b.satiation_gain * np.eye(parameters.TOPICS)[topics].sum(axis=1)
        np.testing.assert_allclose(once.satiation, expected, atol=1e-6)
        shown = np.asarray(once.candidates[:, :K])
        _, twice = step(jax.random.key(0), once, first_slate(), sim.default_params)
        expected = b.satiation_decay * expected + b.satiation_gain * np.eye(parameters.TOPICS)[
            sim.default_params.topic[shown]
        ].sum(axis=1)
        np.testing.assert_allclose(twice.satiation, expected, atol=1e-6)
        # More of the same is watched and enjoyed less, other topics as before.
        videos = jnp.broadcast_to(jnp.arange(500), (B, 500))
        fresh, bored = (
            affinity(sim.default_params, state.traits, state.interest, s, videos)
            for s in (state.satiation, twice.satiation)
        )
        weight = np.take_along_axis(np.asarray(twice.satiation), np.asarray(sim.default_params.topic)[videos], axis=1)
        assert (weight > 0).any() and (weight == 0).any()
        np.testing.assert_allclose(bored.engagement - fresh.engagement, -b.engagement_satiation * weight, atol=1e-5)
        np.testing.assert_allclose(bored.enjoyment - fresh.enjoyment, b.enjoyment_satiation * weight, atol=1e-5)
        np.testing.assert_array_equal(bored.match, fresh.match)

    def test_a_good_session_brings_users_back_sooner(self, sim):
        state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 5)[2]
        state = state.replace(position=jnp.full((B,), 4))
        mean = {}
        for name, enjoyment in (("good", 2.0), ("fair", 1.0), ("bad", -1.0)):
            days = next_visit(
                jax.random.key(1), state.replace(total_enjoyment=jnp.full((B,), 4 * enjoyment)), sim.default_params
            )
            assert days.dtype == jnp.int32 and days.min() >= 1 and days.max() <= 30
            mean[name] = (float(days.mean()), float((days == 1).mean()))
        assert mean["good"][0] < mean["fair"][0] < mean["bad"][0]
        assert mean["good"][1] > mean["fair"][1] > mean["bad"][1]

    def test_enjoyment_counts_requests_not_videos(self, sim):
        (_, result), _, _ = play(sim.default_params, jax.random.key(0), jnp.arange(B), steps=1)
        _, _, state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 0)
        truth = affinity(sim.default_params, state.traits, state.interest, state.satiation, state.candidates[:, :K])
        _, after = step(jax.random.key(0), state, first_slate(), sim.default_params)
        np.testing.assert_allclose(after.total_enjoyment, truth.enjoyment.mean(axis=1), atol=1e-5)
        np.testing.assert_array_equal(after.position, 1)
        np.testing.assert_allclose(result.request.context[:, 0, 2], np.log(2.0), rtol=1e-6)


class TestRankers:
    def test_production_sees_no_hidden_truth(self, sim):
        """Scores do not move with true quality, clickbait, interests, habits or satiation."""
        state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 0)[2]
        expected = production(sim.default_params, state)
        hidden = sim.default_params.hidden
        for column in (parameters.LATENT, parameters.LATENT + 1, parameters.LATENT + 3):
            hidden = hidden.at[:, column].set(-hidden[:, column])
        traits = state.traits.replace(
            activity=state.traits.activity + 1, susceptibility=2 * state.traits.susceptibility
        )
        other = state.replace(interest=-state.interest, satiation=state.satiation + 1, traits=traits)
        np.testing.assert_array_equal(production(sim.default_params.replace(hidden=hidden), other), expected)

    def test_oracles_know_it(self, sim):
        state = reset(jax.random.key(0), sim.default_params, jnp.arange(B), 0)[2]
        truth = affinity(sim.default_params, state.traits, state.interest, state.satiation, state.candidates)
        myopic = oracle_myopic(sim.default_params, state)
        np.testing.assert_allclose(myopic, expected_watch(sim.default_params, truth), rtol=1e-5)
        planning = oracle_planning(sim.default_params, state, 3.0)
        np.testing.assert_allclose(planning, myopic + 3.0 * truth.enjoyment, rtol=1e-4, atol=1e-4)
        assert ops.top_k(reference_policies.random(sim.default_params, state), 3).tolist() == [[0, 1, 2]] * B


class TestConfig:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"variant": "moon"}, "'moon'.*base, users, exit_hazard, sparse"),
            ({"num_videos": 50}, "world.candidates=100 must lie between world.slate=6 and world.num_videos=50"),
            ({"candidates": 5}, "world.candidates=5 must lie between world.slate=6"),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            parameters.WorldConfig(**changes)

    def test_too_few_videos(self):
        with pytest.raises(ValueError, match=r"world.num_videos=700 .*world.candidates=100 .*use more videos or fewer"):
            env.make_world(parameters.WorldConfig(num_videos=700))

    def test_seeds_make_other_worlds(self, sim):
        other = items.make_world_params(parameters.WorldConfig(num_videos=3000, candidates=20, seed=1))
        assert not np.array_equal(other.hidden, sim.default_params.hidden)
        ids = jnp.arange(8)
        assert not np.array_equal(draw(ids, other)[0].activity, draw(ids, sim.default_params)[0].activity)

    @pytest.mark.slow
    def test_a_million_videos(self):
        sim = env.make_world(parameters.WorldConfig(num_videos=1_000_000))
        assert sim.items.num_videos == 1_000_000
        candidates = np.asarray(reset(jax.random.key(0), sim.default_params, jnp.arange(B), 30)[0].candidates)
        assert all(len(set(row)) == 100 for row in candidates) and candidates.max() < 1_000_000
