"""Items that arrive after the export: ranked by their features, kept over a crash, and never dropped in silence."""

import asyncio
import contextlib
import dataclasses
import shutil

import exporting
import numpy as np
import pytest
import tiny

from mmrf_jax.data.readers import feedback_log, feedback_sessions
from mmrf_jax.serving import artifact, new_items, ranker
from mmrf_jax.serving.service import Asked, Refused, Service, Settings

pytestmark = pytest.mark.usefixtures("few_sizes")
IDS = exporting.VIDEO_IDS
NEW = {"id": 77, "features": [0.5, -1.5], "author": 3, "tag": 99, "duration": 21.0}


@pytest.fixture
def settings(mmrf, tmp_path) -> Settings:
    return Settings(artifact=mmrf[2], log=tmp_path / "log", max_candidates=12, max_new_items=40)


@contextlib.asynccontextmanager
async def running(settings: Settings):
    made = Service(settings)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def asked(user: int, candidates, **fields) -> Asked:
    return Asked(user, np.array(candidates), np.array([0.25], np.float32), 2, **fields)


def trained_with(folder, item) -> artifact.Artifact:
    """The artefact as if the item had been in its catalogue, without a separate embedding."""
    loaded = artifact.load(folder)
    row = {"video_id": item["id"], "author": item["author"], "tag": 0, "duration": item["duration"], "embedding_id": 0}
    row["features"] = [item["features"]]
    for name, value in row.items():
        known = loaded.arrays["catalogue"][name]
        loaded.arrays["catalogue"][name] = np.concatenate(
            [known, np.reshape(value, (1, *known.shape[1:])).astype(known.dtype)]
        )
    return loaded


def test_a_new_item_is_ranked_like_one_of_the_catalogue(mmrf, settings):
    wanted = ranker.Ranker(trained_with(mmrf[2], NEW), 12)
    history = np.array([77, IDS[2]]), tiny.make_feedback(np.random.default_rng(0), (2,))
    candidates = [int(IDS[4]), 77, int(IDS[9])]

    async def run():
        async with running(settings) as s:
            before = dict(s.ranker.traces)
            assert await s.add_items([NEW]) == [True] and await s.add_items([NEW | {"author": 1}]) == [False]
            assert await s.add_items([NEW | {"id": 100 + n} for n in range(20)]) == [True] * 20
            slate = await s.rank(asked(7, candidates, history=history))
            assert s.ranker.traces == before and not slate.unknown and not slate.unknown_history
            return slate

    slate = asyncio.run(run())
    context = np.array([0.25, 0.0], np.float32)
    seen = [ranker.Seen(np.array([30, 2]), history[1], None)]
    job = ranker.Job(7, np.zeros(3, np.float32), context, np.array([4, 30, 9]), None, seen)
    np.testing.assert_allclose(list(slate.scores.values()), wanted.run([job])[0][0], rtol=1e-4, atol=1e-5)
    records = [record for record, _ in feedback_log.scan(settings.log)]
    assert [record["kind"] for record in records] == ["item"] * 21 + ["rank"]
    assert {name: records[0][name] for name in NEW} == NEW
    assert feedback_log.unpack_ids(records[-1]["candidates"]).tolist() == candidates


def test_new_items_outlive_the_process(settings, tmp_path):
    async def run(settings, first):
        async with running(settings) as s:
            if first:
                await s.add_items([NEW])
                shutil.copytree(settings.log, tmp_path / "lost", ignore=shutil.ignore_patterns("*.sqlite*"))
            return await s.rank(asked(15 if first else 16, [77, int(IDS[3])]))

    scores = [asyncio.run(run(settings, True)), asyncio.run(run(settings, False))]
    scores.append(asyncio.run(run(dataclasses.replace(settings, log=tmp_path / "lost"), False)))
    for slate in scores:
        assert slate.unknown == []
        np.testing.assert_allclose(slate.scores["click"], scores[0].scores["click"], rtol=1e-4, atol=1e-5)


def test_what_is_unknown_is_answered(settings):
    async def run():
        async with running(settings) as s:
            history = np.array([IDS[1], 5]), np.zeros((2, len(s.ranker.spec.signals)), np.float32)
            slate = await s.rank(asked(7, [77, int(IDS[3]), 78], history=history))
            assert (slate.unknown, slate.unknown_history) == ([77, 78], [5])
            with pytest.raises(Refused, match="knows none of the videos 77, 78; describe them in items"):
                await s.rank(asked(7, [77, 78]))

    asyncio.run(run())


def test_items_that_cannot_be_are_refused(settings):
    async def refused(s, items, status, said, field):
        with pytest.raises(Refused, match=said) as error:
            await s.add_items(items)
        assert (error.value.status, error.value.field) == (status, ("body", "items", *field))

    async def run():
        async with running(settings) as s:
            few = {"id": 5, "features": [1.0]}
            await refused(
                s, [NEW, few], 422, "item 5: features has 1 numbers, the artefact's items have 2", (1, "features")
            )
            names = {"id": 5, "features": {"price": 1.0}}
            await refused(s, [names], 422, "knows no names of features; give 2 numbers", (0, "features"))
            many = [{"id": 1_000 + n} for n in range(41)]
            await refused(s, many, 409, "41 items are new and there is room for 40", ())
            assert await s.add_items(many[:40]) == [True] * 40 and await s.add_items(many[:1]) == [False]

    asyncio.run(run())
    assert len(list(feedback_log.scan(settings.log))) == 40


def test_running_means_of_a_new_item_are_priors(mmrf):
    loaded = artifact.load(mmrf[2])
    rng = np.random.default_rng(0)
    author, tag = loaded.arrays["catalogue"]["author"], loaded.arrays["catalogue"]["tag"]
    means = rng.normal(size=(30, 6)).astype(np.float32)  # of the video, author, tag: a mean and a count each
    means[:, 2:4], means[:, 4:] = means[author, 2:4], means[tag, 4:]
    loaded.arrays["catalogue"]["features"] = np.concatenate([loaded.arrays["catalogue"]["features"], means], axis=1)
    loaded.manifest["num_statistics"] = 6
    loaded = dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, item_features=8))
    describe = new_items.Describer(loaded).describe
    of_author, count = means[np.flatnonzero(author == 3)[0], 2:4], means[:, 1].min()
    of_tag = means[np.flatnonzero(tag == 0)[0], 4:]  # tag 99 is not of the training
    np.testing.assert_allclose(describe(NEW)["features"], [0.5, -1.5, 0.0, count, *of_author, *of_tag])
    full = list(range(8))
    np.testing.assert_array_equal(describe(NEW | {"features": full})["features"], full)


def test_several_users_are_one_batch(settings):
    async def run():
        async with running(settings) as s:
            some = [asked(user, IDS[[user, 1, 2]]) for user in range(10, 20)]
            slates = await s.rank_all(some)
            assert s.metrics.registry.get_sample_value("mmrf_batch_size_count") == 1
            assert [slate.request for slate in slates] == [f"{user}-0" for user in range(10, 20)]
            for slate, one in zip(slates, some, strict=True):
                alone = await s.rank(dataclasses.replace(one, user=one.user + 100))
                np.testing.assert_allclose(slate.scores["click"], alone.scores["click"], rtol=1e-4, atol=1e-5)
            with pytest.raises(Refused) as error:
                await s.rank_all([some[0], asked(3, [5])])
            assert error.value.field == ("body", 1, "candidates")
            return len(some)

    number = asyncio.run(run())
    assert len(list(feedback_log.scan(settings.log))) == 2 * number  # none of what was refused


def test_a_split_serves_each_user_by_one_arm_and_says_which(settings, other, capfd):
    both = dataclasses.replace(settings, artifact_b=other, split=0.4, temperature=1.0)

    async def run():
        async with running(both) as s:
            assert s.warnings == []
            await s.add_items([NEW])
            slates = {}
            for user in range(30):
                for number in range(1 + user % 2):
                    slate = await s.rank(asked(user, [77, *IDS[:4]]))
                    feedback = np.zeros((2, len(s.ranker.spec.signals)), np.float32)
                    feedback[0, 0] = 1.0
                    await s.feedback(f"{user}/{number}", slate.request, slate.videos, feedback, number == 1)
                    assert slates.setdefault(user, slate).arm == slate.arm and not slate.unknown
            served = {arm: serving.id for arm, serving in s.rankers.items()}
            assert all(slate.artifact == served[slate.arm] for slate in slates.values())
            return {user: slate.arm for user, slate in slates.items()}

    arm_of = asyncio.run(run())
    assert "warning" not in capfd.readouterr().err
    arms = feedback_sessions.by_arm(settings.log, exporting.SHORT_VIDEO)
    for arm in "ab":
        users = [user for user in arm_of if arm_of[user] == arm]
        assert 5 < len(users) < 25
        np.testing.assert_array_equal(arms[arm]["requests"], [1 + user % 2 for user in users])
        np.testing.assert_array_equal(arms[arm]["click"], arms[arm]["requests"])
        assert not arms[arm]["like"].any()


def test_a_log_without_propensities_is_warned_of(settings, capfd):
    async def run():
        async with running(settings) as s:
            assert len(s.warnings) == 1

    asyncio.run(run())
    assert "the log has no usable propensities" in capfd.readouterr().err
