"""Words that the project does not use: those of nobody's papers, and phrases that a reader has to guess."""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BANNED = (
    *("told", "beside", "dearest", "nobody", "whoever", "born", "of its own", "as they are", "in the place of"),
    *("goes on where", "a chance of", "judged", "judging"),
)
#: Names that the code does not use, with those that it does.
NAMES = {
    "simulates": "uses_model",
    "predicts": "has_feedback_heads",
    "collects": "collects_on_policy",
    "joy": "enjoyment",
    "drive": "engagement",
    "skip": "skip_prob",
    "soft_top_k": "relaxed_top_k",
    "main_exposure": "relaxed_top_k",
    "blind": "feature_dropout",
    "server_state": "behavior_params",
    "_still": "_without_dropout",
    "continue_probability": "continue_prob",
    "policy_stay": "policy_continue_prob",
    "base_loss": "slate_bias_loss",
    "loss/stay": "loss/continuation",
    "loss/base": "loss/slate_bias",
    "trust": "gate",
    "looks": "interim_analyses",
    "srm": "sample_ratio_mismatch",
    "lasting": "novelty_effect",
    "fidelity": "model_quality",
    "offline_other": "offline/LOG",
    "test_frozen": "test_frozen_history",
    "optimism": "uncertainty_bonus, or model_exploitation_gap",
    "stay_logit": "continue_logit",
}
#: Names that a traceback does not tell apart: each is of one module at most.
GENERIC = ("make", "init", "compare", "format_table", "Batches", "Shown")
FOLDERS = ("mmrf_jax", "launch", "experiments", "examples", "docs", "tests")


def test_the_field_s_words():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    files += [ROOT / "README.md", ROOT / "WORKSPACE.md"]
    files = [path for path in files if "results" not in path.relative_to(ROOT).parts and path != Path(__file__)]
    pattern = re.compile(rf"\b({'|'.join(BANNED)})\b(?!\.md)", re.IGNORECASE)  # docs/judging.md is a page
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert len(files) > 200 and not found, "\n".join(found)


def test_names():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    names = "|".join(NAMES)
    pattern = re.compile(rf"(?:(?<!pytest)\.|\b(?:def|class) )({names})\b|\b({names})(?:=|: | = )|\"({names})\"")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {name}, which is {NAMES[name]}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for name in filter(None, itertools.chain(*pattern.findall(line)))
    ]
    assert len(files) > 400 and not found, "\n".join(found)


def test_generic_names_are_of_one_module():
    pattern = re.compile(rf"^(?:def|class) ({'|'.join(GENERIC)})\b", re.MULTILINE)
    found = [name for path in (ROOT / "mmrf_jax").rglob("*.py") for name in pattern.findall(path.read_text())]
    assert "make" in found and len(found) == len(set(found)), found
