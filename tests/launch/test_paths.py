"""Paths mean what the user wrote, in every path flag of every main and every path field of the configs."""

import ast
import importlib
import types
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import kuairand
from mmrf_jax.checkpointing.manager import CheckpointError, Checkpoints, targets
from mmrf_jax.cli import common
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.data.readers.engine import tasks
from mmrf_jax.data.readers.kuairand import builder, synthetic
from mmrf_jax.io import files, metric_writer
from mmrf_jax.parallel.partitioner import Partitioner
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.training import arms, configs, restore, run_folder

ROOT = Path(__file__).resolve().parents[2]
MAINS = sorted(ROOT / "mmrf_jax" / "cli" / path.name for path in (ROOT / "launch").glob("[a-z]*.py"))
#: Names that some library below takes for something else than a name.
AWKWARD = (
    "x[3]",
    "x[1:3]",
    "a  b",
    " lead",
    "trail ",
    "it's",
    'a"b',
    "ünï✓",
    "st*r?",
    "{0}{x}",
    "%d%s",
    "$HOME",
    "#&;|",
    "new\nline",
    "-dash",
    "~x",
    "a:b",
    "run@2",
    "s@*",
    "a,b",
    "..x",
    "a=b",
    "back\\slash",
)
#: One folder with all that checkpoints can be in.
ALL = "".join(name for name in AWKWARD if "\\" not in name)
#: Text flags that are no paths, and lists of which each item may be one.
NO_PATHS = {"host", "coordinator_address", "pipeline_option", "experiment"}
NAMES_OR_PATHS = {"arms", "policy"}
LISTS = {"parts"}
#: Fields of configs that are paths; `run.` is that of studies.
FIELDS = {"simulator_checkpoint", "data.dir", "data.cache_dir", "data.served", "data.path"}


def flags_of(path: Path) -> dict[str, str]:
    """{flag: the function that defines it} of a main."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.args]
    return {
        call.args[0].value: call.func.attr
        for call in named
        if call.func.attr.lower().startswith("define_") and isinstance(call.args[0], ast.Constant)
    }


def test_every_text_flag_of_every_main_is_a_path_or_known_as_none():
    found = {f"{path.stem} --{name}": (name, how) for path in MAINS for name, how in flags_of(path).items()}
    texts = {where: name for where, (name, how) in found.items() if how in ("DEFINE_string", "DEFINE_multi_string")}
    assert set(texts.values()) <= NO_PATHS | NAMES_OR_PATHS, texts
    lists = {name for name, how in found.values() if how == "DEFINE_list"}
    assert lists <= LISTS | NAMES_OR_PATHS
    paths = {where for where, (_, how) in found.items() if how == "define_path"}
    assert {"train --workdir", "serve --token_file", "prepare --source", "sweep --runs", "ab_test --plot"} <= paths


PATH_FLAGS = sorted((path.stem, name) for path in MAINS for name, how in flags_of(path).items() if how == "define_path")


@pytest.mark.parametrize(("main", "flag"), PATH_FLAGS)
def test_every_path_flag_of_every_main_means_what_it_says(main, flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of[me]")
    parse = common._PathParser(flag).parse
    for name in AWKWARD:
        assert parse(f"some/{name}/run") == Path("some") / name / "run"
    assert parse("~/run") == Path("/home/of[me]/run")
    assert str(parse("memory://bucket/run")) == "memory://bucket/run"
    for wrong in ("", "gs://", "nothing://bucket/run", "~no-user-of-that-name/run", "a\udcff"):
        with pytest.raises(ValueError, match=f"^--{flag}"):
            parse(wrong)


def strings(config: ml_collections.ConfigDict) -> dict[str, object]:
    return {name: value for name, value in run_folder.flat_config(config.to_dict()).items() if isinstance(value, str)}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_every_path_field_of_every_experiment_is_known(path):
    """A text that looks like a path, or is empty until it is one, belongs to `FIELDS`, which the next test tries."""
    module = importlib.import_module(f"experiments.{path.stem}")
    if not hasattr(module, "get_config"):
        return
    for name, value in strings(module.get_config()).items():
        if "/" in value or name.endswith(("dir", "checkpoint", "path", "file")):
            assert name.removeprefix("run.") in FIELDS, name


def test_path_fields_mean_what_they_say(tmp_path, monkeypatch):
    home = tmp_path / "of [me]"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tasks, "MOST_WORKERS", 1)
    config = configs.override(configs.Run(), data={"dir": "~/x[3]"})
    with pytest.raises(FileNotFoundError) as error:  # of a world that is not made, which takes its time
        restore.open_source(config, builder.unchecked)
    assert str(home / "x[3]") in str(error.value)
    config = kuairand.get_config()
    config.data.dir = "~/x[3]"
    with pytest.raises(FileNotFoundError) as error:
        restore.open_source(configs.run_of(config.to_dict()), builder.unchecked)
    assert str(home / "x[3]") in str(error.value)
    synthetic.SyntheticLog(3_000, 60, 300, "pure", 0).write(home / "x[3]", builder.unchecked)
    config.data.cache_dir, config.data.served = "~/c[1]", "~/s[1]"
    source = restore.open_source(configs.run_of(config.to_dict()), builder.unchecked)
    assert list((home / "c[1]").iterdir()) and sum(log.num_sessions for log in source.test().values())
    with pytest.raises(FileNotFoundError) as error:
        source.train()
    assert str(home / "s[1]") in str(error.value)
    config.simulator, config.simulator_checkpoint = "feedback", "~/x[3]"
    with pytest.raises(ValueError) as refused:
        restore.source_of(configs.run_of(config.to_dict()), Partitioner())
    assert f"{home / 'x[3]'} is not a run folder" in str(refused.value)
    with pytest.raises(ValueError) as refused:
        source = types.SimpleNamespace(policies={}, config=types.SimpleNamespace(plugins=()))
        arms.policy_of("~/x[3]", source, Partitioner())
    assert f"{home / 'x[3]'} is not a run folder" in str(refused.value)


def test_what_libraries_write_into_a_folder_is_found_there_again(tmp_path):
    """Checkpoints (orbax), events (tensorboardX), real logs (polars, array_record), feedback logs."""
    folder = tmp_path / ALL[: len(ALL) // 2] / ALL[len(ALL) // 2 :]
    state = {"a": jnp.arange(5.0), "tables": {"t": jnp.ones((4, 2))}}
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state)
    with Checkpoints(folder) as checkpoints:
        found, step = checkpoints.restore(targets(state))
        assert step == 3 and checkpoints.all_steps() == [2, 3]
    np.testing.assert_array_equal(found["a"], state["a"])
    with metric_writer.MetricsWriter(folder) as writer:
        writer.write(1, "train", {"loss": 1.0})
    assert list((folder / "tensorboard").iterdir())
    with feedback_log.Writer(folder / "log", SHORT_VIDEO):
        pass
    assert feedback_log.is_log(folder / "log")
    synthetic.SyntheticLog(3_000, 60, 300, "pure", 0).write(folder / "csv", builder.unchecked)
    with tasks.worker_processes(1) as engine:
        made = builder.open_or_prepare(folder / "csv", folder / "cache", engine=engine).part("train")
        builder.prepare_log(folder / "csv", folder / "out", engine=engine)
    again = builder.open_or_prepare(folder / "out", folder / "unused").part("train")
    assert again.num_sessions == made.num_sessions > 0
    assert [path.name for path in tmp_path.iterdir()] == [folder.parent.name]


def test_what_a_library_cannot_take_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="TensorStore takes a backslash for a slash"):
        Checkpoints(tmp_path / "back\\slash")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", AWKWARD)
def test_a_run_config_is_read_where_workdir_says(name, tmp_path):
    (tmp_path / name).mkdir()
    files.write_json(tmp_path / name / "config.json", {"seed": 3})
    assert run_folder.read_config(files.user_path(str(tmp_path / name), "--workdir")) == {"seed": 3}
