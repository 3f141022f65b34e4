"""Scores of batches are those of single requests; slates are drawn as their logged probability says."""

import dataclasses
import itertools

import exporting
import jax
import numpy as np
import pytest
import tiny

from mmrf_jax import types
from mmrf_jax.agents import registry
from mmrf_jax.serving import artifact, ranker
from mmrf_jax.serving.ranker import Job, Seen
from mmrf_jax.signals import SHORT_VIDEO

S = len(SHORT_VIDEO)


@pytest.fixture(scope="module")
def warm(mmrf):
    made = ranker.Ranker(artifact.load(mmrf[2]), max_candidates=20)
    made.warm()
    return made


def seen(videos, feedback):
    """A history as requests of K = 3 videos, the newest last."""
    ends = range(len(videos), 0, -3)
    return [Seen(videos[max(e - 3, 0) : e], feedback[max(e - 3, 0) : e], None) for e in ends][::-1]


def flat(job):
    """The videos and the feedback of all requests of a job."""
    videos = np.concatenate([np.zeros(0, np.int64), *(x.videos for x in job.seen)])
    return videos, np.concatenate([np.zeros((0, S), np.float32), *(x.feedback for x in job.seen)])


def some_jobs(rng, number: int) -> list[Job]:
    jobs = []
    for _ in range(number):
        e = int(rng.choice([0, 1, 3, 5, 64, 65, 200]))
        jobs.append(
            Job(
                user_id=int(rng.integers(0, 9)),
                profile=rng.normal(size=3).astype(np.float32),
                context=rng.normal(size=2).astype(np.float32),
                candidates=rng.permutation(30)[: rng.integers(1, 21)],
                memory=None,
                seen=seen(rng.integers(0, 30, e), tiny.make_feedback(rng, (e,))),
            )
        )
    return jobs


def test_a_request_is_scored_alike_in_any_company(warm, mmrf):
    plan, state, _ = mmrf
    rng = np.random.default_rng(0)
    jobs = some_jobs(rng, 70)  # more than the largest batch
    together = warm.run(jobs)
    for job, (scores, memory) in zip(jobs, together, strict=True):
        ((alone, alone_memory),) = warm.run([job])
        assert scores.shape == (3, len(job.candidates))
        np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(memory["outer"], alone_memory["outer"], rtol=1e-5, atol=1e-4)

    live = registry.get("mmrf").make_policy(state.agents, tiny.make_items(), plan.agents)

    @jax.jit
    def serve(params, request, history):
        return live.score(params, live.start(params, request, history), request)

    lengths = [len(flat(job)[0]) for job in jobs]
    assert len(set(lengths)) == 7
    for length in set(lengths):  # of the live policy, histories of one length and candidates of one number
        i = lengths.index(length)
        job, (videos, feedback), number = jobs[i], flat(jobs[i]), len(jobs[i].candidates)
        history = types.Exposure(
            np.resize(videos, (1, 200)) if length else np.zeros((1, 200), np.int64),
            np.pad(feedback, ((0, 200 - length), (0, 0)))[None],
            np.arange(200)[None] < length,
        )
        candidates = np.concatenate([job.candidates, np.setdiff1d(np.arange(30), job.candidates)[: 20 - number]])
        asked = types.Request(
            np.array([job.user_id], np.int32), job.profile[None], job.context[None], candidates[None].astype(np.int32)
        )
        whole = dataclasses.replace(job, candidates=candidates)
        wanted = serve(live.params, asked, history)
        np.testing.assert_allclose(warm.run([whole])[0][0][-1], wanted[0], rtol=1e-4, atol=1e-4)


def test_a_memory_that_is_kept_is_the_one_made_anew(warm):
    """In parts or at once: what a service does between requests, and after a start."""
    rng = np.random.default_rng(1)
    job = next(j for j in some_jobs(rng, 30) if len(j.seen) == 67)
    ((whole, memory),) = warm.run([job])
    carried = None
    for request in job.seen:
        part = Job(job.user_id, job.profile, job.context, job.candidates, carried, [request])
        ((scores, carried),) = warm.run([part])
    np.testing.assert_allclose(scores, whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(carried["outer"], memory["outer"], rtol=1e-4, atol=1e-4)


def test_nothing_is_compiled_after_the_start(warm):
    before = dict(warm.traces)
    for seed in range(5):
        warm.run(some_jobs(np.random.default_rng(seed), 1 + 13 * seed))
    assert warm.traces == before
    assert before == {"encode": 1, "observe": 8, "score": 8}  # four batches by two lengths, or widths


def test_videos_are_called_by_the_platforms_ids(warm):
    ids = exporting.VIDEO_IDS
    np.testing.assert_array_equal(warm.rows_of(ids[::-1]), np.arange(30)[::-1])
    np.testing.assert_array_equal(warm.rows_of(np.array([0, ids[3] + 1, ids[-1] + 7, ids[3]])), [-1, -1, -1, 3])


def test_ids_in_any_order(mmrf):
    loaded = artifact.load(mmrf[2])
    loaded.arrays["catalogue"]["video_id"] = np.random.default_rng(0).permutation(30) + 5
    made = ranker.Ranker(loaded, max_candidates=8)
    ids = loaded.arrays["catalogue"]["video_id"]
    np.testing.assert_array_equal(made.rows_of(ids), np.arange(30))
    assert made.rows_of(np.array([4, 35])).tolist() == [-1, -1]


def test_slates_have_the_probability_that_is_logged():
    scores = np.array([0.3, -1.0, 2.0, 0.5], np.float32)
    logits = (scores - scores.mean()) / scores.std() / 0.7
    odds = np.exp(logits)
    expected = {
        (a, b): odds[a] / odds.sum() * odds[b] / (odds.sum() - odds[a]) for a, b in itertools.permutations(range(4), 2)
    }
    counts = dict.fromkeys(expected, 0)
    number, rng, found, wanted = 5_000, np.random.default_rng(0), [], []
    for _ in range(number):
        slate, said, log_propensity = ranker.choose(scores, 2, 0.7, rng)
        counts[tuple(slate.tolist())] += 1
        found.append(log_propensity)
        wanted.append(expected[tuple(slate.tolist())])
    np.testing.assert_allclose(np.exp(found), wanted, rtol=1e-5)
    np.testing.assert_allclose(said, logits, rtol=1e-5)
    for slate, p in expected.items():
        assert abs(counts[slate] / number - p) < 4.5 * np.sqrt(p * (1 - p) / number)


def test_the_best_are_served_without_chance():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.permutation(40).astype(np.float32)
        slate, _, log_propensity = ranker.choose(scores, 6, 0.0, rng)
        assert scores[slate].tolist() == [39, 38, 37, 36, 35, 34] and log_propensity == 0.0
    slate, _, _ = ranker.choose(np.zeros(3, np.float32), 6, 0.0, rng)
    assert slate.tolist() == [0, 1, 2]  # fewer candidates than asked for, ties by place
