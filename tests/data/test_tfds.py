"""A log as a TensorFlow dataset: what plain tensorflow_datasets reads is what the log holds."""

import numpy as np
import pytest
import tensorflow_datasets

from mmrf_jax.data import records, tfds

PER_REQUEST = ("context", "candidates", "slate", "feedback", "log_propensity")
PER_SESSION = ("user_id", "date", "profile", "history_videos", "history_feedback", "history_mask")


@pytest.fixture
def parts(tmp_path, make_log, spec):
    sizes = {"train": 300, "valid": 0, "test": 3}  # two blocks, none, one
    for i, (name, size) in enumerate(sizes.items()):
        records.write_log(make_log(i, size), tmp_path / name, spec)
    return {name: records.Blocks(tmp_path / name) for name in sizes}


def test_tensorflow_datasets_reads_what_the_log_holds(tmp_path, parts):
    tfds.write(parts, tmp_path / "datasets", name="made_up")
    builder = tensorflow_datasets.builder("made_up", data_dir=tmp_path / "datasets")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 300, "test": 3}
    for name in ("train", "test"):
        log = parts[name].read(range(len(parts[name].sessions)))
        source = builder.as_data_source(name)
        assert len(source) == log.num_sessions
        for i, session in enumerate(source):
            for field in (*PER_SESSION, "terminated", "truncated"):
                np.testing.assert_array_equal(session[field], getattr(log, field)[i], err_msg=field)
            for field in PER_REQUEST:
                wanted = getattr(log, field)[log.offsets[i] : log.offsets[i + 1]]
                np.testing.assert_array_equal(session[field], wanted, err_msg=field)
                assert session[field].dtype == wanted.dtype, field


def test_nothing_is_overwritten_and_no_empty_dataset_is_made(tmp_path, parts):
    (tmp_path / "datasets" / "made_up").mkdir(parents=True)
    with pytest.raises(ValueError, match="name is 'My-Shop'; use lower-case letters"):
        tfds.write({}, tmp_path, name="My-Shop")
    with pytest.raises(FileExistsError, match=r"made_up exists; remove it or use another name"):
        tfds.write(parts, tmp_path / "datasets", name="made_up")
    with pytest.raises(ValueError, match=r"no part of valid has sessions; there is nothing to write to .*other"):
        tfds.write({"valid": parts["valid"]}, tmp_path / "datasets", name="other")
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["made_up"]
