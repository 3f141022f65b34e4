"""Names from outside the package: registered once, found again by their module, and missing ones named."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mmrf_jax as mmrf
from experiments import table_ablation
from mmrf_jax import plugins, types
from mmrf_jax.agents import registry, td3_bc
from mmrf_jax.envs import registry as environments
from mmrf_jax.signals import SHORT_VIDEO
from mmrf_jax.sweeps import study, sweep
from mmrf_jax.training import arms, configs, run_folder, steps, train

ROOT = Path(__file__).resolve().parents[1]
MODULE = """
import mmrf_jax as mmrf
from mmrf_jax.agents import td3_bc
mmrf.register_method("{0}", mmrf.Method(td3_bc.update))
mmrf.register_policy("{0}", lambda key, obs: obs.features[..., 0])
mmrf.register_env("{0}", lambda: "{0}")
"""


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry._registry, "entries", dict(registry.METHODS))
    monkeypatch.setattr(registry._registry, "_modules", {})
    monkeypatch.setattr(plugins, "POLICIES", plugins.Registry("policy", {}))
    monkeypatch.setattr(environments.ENVIRONMENTS, "entries", dict(environments.ENVIRONMENTS.entries))
    plugins.load_entry_points.cache_clear()
    yield
    plugins.load_entry_points.cache_clear()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name): a new module that registers a method and a policy of its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> str:
        (tmp_path / f"{name}.py").write_text(MODULE.format(name))
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


def test_a_registered_method_is_found_with_its_module():
    method = mmrf.Method(td3_bc.update)
    mmrf.register_method("other", method)
    mmrf.register_method("other", method)  # a module that is imported twice
    assert registry.get("other") is method and registry.module_of("other") == __name__
    assert registry.module_of("mmrf") is None
    with pytest.raises(ValueError, match="a method named 'other' is registered already; use another name"):
        mmrf.register_method("other", mmrf.Method(td3_bc.update))
    with pytest.raises(ValueError, match="a method named 'mmrf' is registered already"):
        mmrf.register_method("mmrf", method)


@pytest.mark.parametrize("name", ["", "a/b", "a,b", " a", "a=b"])
def test_names_that_flags_and_folders_cannot_have_are_refused(name):
    with pytest.raises(ValueError, match="cannot name a policy; use letters"):
        mmrf.register_policy(name, lambda key, obs: obs)


def test_what_is_no_method_or_policy_is_refused():
    with pytest.raises(TypeError, match=r"method 'x' is <function.*give a mmrf_jax\.agents\.registry\.Method"):
        mmrf.register_method("x", td3_bc.update.func)
    with pytest.raises(TypeError, match=r"policy 'x' is 3; give a function \(key, obs\) -> scores \[B, C\]"):
        mmrf.register_policy("x", 3)


def test_an_unknown_name_gives_the_nearest_and_all():
    with pytest.raises(ValueError) as error:
        registry.get("td3bc")
    text = str(error.value)
    assert text.startswith("unknown method 'td3bc'; did you mean td3_bc") and "There are mmrf, bc, wide_deep" in text
    assert text.endswith("--import=MODULE, the module that registers it") and "\n" not in text


def test_the_modules_of_a_config_are_imported_when_a_name_is_unknown(module):
    name = module("plugin_a")
    config = configs.run_of({**configs.as_dict(configs.Run()), "method": name, "plugins": ["plugin_a"]})
    assert steps.plan_of(config, SHORT_VIDEO).method == name and registry.module_of(name) == "plugin_a"
    assert plugins.POLICIES.module_of(name) == "plugin_a"


def test_a_missing_module_is_named_with_the_flag():
    config = configs.run_of({**configs.as_dict(configs.Run()), "method": "lost", "plugins": ["plugin_lost"]})
    with pytest.raises(
        ValueError,
        match=r"^unknown method 'lost': it may be of module 'plugin_lost', which is not found; .*--import=MODULE",
    ):
        steps.plan_of(config, SHORT_VIDEO)
    with pytest.raises(ValueError, match=r"--import=plugin_lost: there is no module 'plugin_lost'"):
        plugins.load(["plugin_lost"])
    with pytest.raises(ValueError, match=r"--import=json\.nosuch: there is no module 'json\.nosuch'"):
        plugins.load(["json.nosuch"])
    with pytest.raises(ValueError, match=r"--import=a/b\.py: there is no module"):
        plugins.load(["a/b.py"])


def test_a_run_s_config_lists_the_modules_that_it_needs(module):
    plugins.load([module("plugin_b"), module("plugin_c"), module("plugin_d")])
    config = configs.override(configs.Run(method="plugin_b"), ab_test={"arms": ("production", "plugin_c")})
    assert train._with_plugins(config).plugins == ("plugin_b", "plugin_c")
    assert train._with_plugins(configs.Run(plugins=("z",))).plugins == ("z",)
    assert train._check_arms(config, {"production": None}) == ["production", "plugin_c"]
    with pytest.raises(ValueError, match=r"unknown arm 'oracle' in config\.ab_test\.arms; choose among production"):
        train._check_arms(configs.override(config, ab_test={"arms": ("oracle",)}), {"production": None})
    assert run_folder.is_free("plugins")  # a folder is the run's wherever its plug-in lies


def test_a_study_takes_methods_and_arms_of_plug_ins(module, tmp_path):
    name, config = module("plugin_s"), table_ablation.get_config()
    config.run.plugins, config.run.method, config.arms, config.tables = (
        (name,),
        name,
        ("production", name),
        ("ab_test",),
    )
    config.variants = {config.reference: {}}
    config.against = {}
    assert study.run_config(config, config.reference, 0).method == name and name not in sys.modules
    sweep.check_study(study.Study(config, tmp_path / "out", tmp_path / "runs"))
    config.arms = ("production", "nosuch")
    with pytest.raises(ValueError, match=r"unknown arm 'nosuch' in config\.arms"):
        sweep.check_study(study.Study(config, tmp_path / "out", tmp_path / "runs"))


def test_a_plain_function_is_an_arm():
    plugins.register_policy("last_feature", lambda key, obs: obs.features[..., -1])
    plugins.register_policy("no_scores", lambda key, obs: obs.user_id)
    items, batch = tiny.make_items(), tiny.make_batch()
    source = SimpleNamespace(policies={}, items=items, spec=tiny.SPEC, config=configs.Run())
    arm = arms.untrained_arm("last_feature", source)
    request = types.Request(batch.user_id, batch.profile, batch.context[:, 0], batch.candidates[:, 0])
    carry = arm.initial_carry(request, jax.tree.map(jnp.asarray, batch.history))
    scores = arm.scores(None, None, carry, request)
    np.testing.assert_array_equal(scores, np.asarray(items.features)[batch.candidates[:, 0], -1])
    assert float(arm.temperature) == 0.0
    with pytest.raises(ValueError, match=r"the policy returned scores of shape .*; return one score per candidate"):
        arms.untrained_arm("no_scores", source).scores(None, None, carry, request)
    with pytest.raises(ValueError, match="unknown policy 'last_featur'; did you mean last_feature"):
        arms.untrained_arm("last_featur", source)


def test_entry_points_are_loaded_when_a_name_is_unknown(module, monkeypatch):
    points = [metadata.EntryPoint("mine", module("plugin_e"), plugins.GROUP)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == plugins.GROUP else [])
    registry.get("mmrf")
    assert "plugin_e" not in sys.modules
    assert registry.get("plugin_e").update is td3_bc.update
    plugins.load_entry_points.cache_clear()
    points[:] = [metadata.EntryPoint("mine", module("plugin_f"), plugins.GROUP)]
    assert mmrf.make("plugin_f") == "plugin_f"
    plugins.load_entry_points.cache_clear()
    points[:] = [metadata.EntryPoint("broken", "plugin_nosuch", plugins.GROUP)]
    with pytest.raises(ValueError, match=r"plug-in broken = 'plugin_nosuch' cannot be loaded \(ModuleNotFoundError"):
        registry.get("nosuch")


def test_registering_a_policy_takes_no_jax_and_a_script_is_its_file(tmp_path):
    (tmp_path / "my_script.py").write_text(
        "import sys, mmrf_jax as mmrf\n"
        "mmrf.register_policy('first', lambda key, obs: obs.features[..., 0])\n"
        "from mmrf_jax import plugins\n"
        "assert 'jax' not in sys.modules\n"
        "print(plugins.POLICIES.module_of('first'))\n"
    )
    command = [sys.executable, tmp_path / "my_script.py"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert done.stdout == "my_script\n"
    shown = "from mmrf_jax import plugins; plugins.register_policy('a', print); print(plugins.POLICIES.module_of('a'))"
    done = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"  # an interactive session, which no other process can import
