"""The held-out log is made for the final evaluation, when learning and the A/B test are over, and not before."""

import dataclasses

import pytest

from experiments import world
from mmrf_jax.training import configs, restore, simulated_tests, train


@pytest.mark.slow
def test_the_test_split_is_not_read_before_the_final_evaluation(tmp_path, monkeypatch):
    config = world.get_config()
    config.update(config.when_quick)
    config.world.update({"num_videos": 1000, "candidates": 20})
    config.collect.update({"sessions": 200, "test_sessions": 200})
    config.alternation.update({"rounds": 1})
    config.ab_test.update({"sessions": 50})
    config.method = "ltr"
    config = configs.run_of(config.to_dict())
    happened, of_config, compare = [], restore.open_source, simulated_tests.run_ab_test

    def watched(*args):
        source = of_config(*args)

        def test():
            happened.append(("test", (tmp_path / "run" / "learned.json").exists()))
            return source.test()

        return dataclasses.replace(source, test=test)

    def compared(*args, **options):
        result = compare(*args, **options)
        happened.append(("ab_test", True))
        return result

    monkeypatch.setattr(restore, "open_source", watched)
    monkeypatch.setattr(simulated_tests, "run_ab_test", compared)
    train.train_run(config, tmp_path / "run")
    assert happened[:2] == [("ab_test", True), ("test", True)]
    assert all(entry == ("test", True) for entry in happened[1:])
