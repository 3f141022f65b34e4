"""Spec, items and ids of a run, kept in its folder."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mmrf_jax
from mmrf_jax.training import inputs


def source(items, ids=None, users=None, unknown=None, names=None, vocabularies=None):
    return types.SimpleNamespace(
        items=items,
        spec=tiny.SPEC,
        video_ids=None if ids is None else lambda: ids,
        users=users,
        unknown_video=unknown,
        names=names,
        vocabularies=vocabularies,
    )


@pytest.mark.parametrize("ids", [None, np.array(["a", "bb"]), np.array([2**60, 1])])
def test_what_is_written_is_read(ids, tmp_path):
    items = tiny.make_items()
    inputs.write_inputs(tmp_path, inputs.inputs_of_source(source(items, ids)))
    found = inputs.read_inputs(tmp_path)
    assert found.spec == tiny.SPEC and found.code == mmrf_jax.__version__
    for field in dataclasses.fields(items):
        np.testing.assert_array_equal(getattr(found.items, field.name), getattr(items, field.name))
    np.testing.assert_array_equal(found.video_ids, ids) if ids is not None else None
    assert (found.video_ids is None) == (ids is None)
    assert found.users is None and found.unknown_video is None


def test_users_and_the_unknown_video_are_kept(tmp_path):
    users = {"user_id": np.array(["", "u1"]), "profile": np.float32([[0, 0, 0], [1, 2, 3]])}
    names = {"context": [{"name": "hour", "kind": "number", "mean": [0.0]}]}
    ids = {"author": np.array(["ann", "bob"]), "tag": np.array([2**40, 7])}
    inputs.write_inputs(
        tmp_path, inputs.inputs_of_source(source(tiny.make_items(), np.arange(30), users, 0, names, ids))
    )
    found = inputs.read_inputs(tmp_path)
    assert found.names == names and found.num_statistics == 0 and found.vocabularies.keys() == ids.keys()
    for name, array in ids.items():
        np.testing.assert_array_equal(found.vocabularies[name], array)
    assert found.unknown_video == 0 and found.users.keys() == users.keys()
    for name, array in users.items():
        np.testing.assert_array_equal(found.users[name], array)


def test_the_newest_statistics_are_features(tmp_path):
    items = tiny.make_items()
    v = items.num_videos
    table = jnp.arange(3.0 * v * 2).reshape(3, v, 2)
    items = dataclasses.replace(items, dates=jnp.array([1, 2]), statistics=table)
    inputs.write_inputs(tmp_path, inputs.inputs_of_source(source(items)))
    assert inputs.read_inputs(tmp_path).num_statistics == 2
    found = inputs.read_inputs(tmp_path).items
    assert found.statistics is None
    np.testing.assert_array_equal(found.features, np.concatenate([items.features, table[-1]], axis=1))


def test_a_folder_without_is_an_older_one_and_damage_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no inputs\.json, which a run writes when it starts; mmrf train --workdir="
    ):
        inputs.read_inputs(tmp_path)
    inputs.write_inputs(tmp_path, inputs.inputs_of_source(source(tiny.make_items())))
    kept = (tmp_path / "inputs.npz").read_bytes()
    inputs.write_inputs(tmp_path, inputs.inputs_of_source(source(tiny.make_items(seed=1))))  # what is there stays
    assert (tmp_path / "inputs.npz").read_bytes() == kept
    (tmp_path / "inputs.npz").write_bytes(kept[:-100])
    with pytest.raises(ValueError, match=r"inputs\.npz cannot be read .*; remove inputs\.json"):
        inputs.read_inputs(tmp_path)
