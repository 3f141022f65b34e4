"""What collaboration is worth: agents that share critics or have their own, and what they communicate.

  mmrf sweep --config=experiments/collaboration.py --out=experiments/results/collaboration
  mmrf sweep --config=experiments/collaboration.py:sparse --out=experiments/results/collaboration_sparse

With shared critics every agent's critic predicts every signal, so a single agent knows what seven know. With
`agents.critics=own` an agent sees only the signals that it is rewarded by, and the rest through communication. The
variants are critics × communication × sessions of a round: no collaboration (`none`), attention and auxiliary scores
(`attention`), one latent vector for all (`massa`), and the watch-time agent alone (`single`). None has a feedback
model, which would see every signal. `sparse` is the world in which watch time says little about staying; the argument
`small` (or `small+sparse`) selects the eight cells of 1,024 sessions, `smallest` of these the four with `none` and
`attention`.

Each is compared with `none` of the same critics and sessions, own critics without collaboration with the shared ones:
differences paired by seed, p-values adjusted for the number of arms (Holm, 1979).

The eight runs of a seed at 1,024 sessions per round take some minutes on two cores, those at 4,096 four times as long.
"""

from typing import Any

from experiments import base

_COMMUNICATION: dict[str, dict[str, Any]] = {
    "none": {"agents": {"ablation": "no_collaboration"}},
    "attention": {},
    "massa": {"method": "massa"},
    "single": {"agents": {"signals": ("watch_time",)}},
}


def get_config(part: str = ""):
    words = set(filter(None, part.split("+")))
    if words - {"small", "smallest", "sparse"}:
        raise ValueError(f"unknown part {part!r}; choose among small, smallest, sparse, small+sparse, smallest+sparse")
    sizes: tuple[int, ...] = (1_024, 4_096)
    among: tuple[str, ...] = tuple(_COMMUNICATION)
    if words & {"small", "smallest"}:
        sizes = (1_024,)
    if "smallest" in words:
        among = ("none", "attention")
    variants, against = {}, {}
    for sessions in sizes:
        for critics in ("shared", "own"):
            for name in among:
                fields = _COMMUNICATION[name]
                agents = {"critics": critics, **fields.get("agents", {})}
                arm, alone = f"{critics}_{name}_{sessions}", f"{critics}_none_{sessions}"
                variants[arm] = {**fields, "agents": agents, "collect": {"sessions": sessions}}
                against[arm] = alone if name != "none" else f"shared_none_{sessions}"
    config = base.get_config(**variants)
    del config.variants["mmrf"]
    config.reference = "shared_none_1024"
    config.against = {arm: other for arm, other in against.items() if arm != other}
    config.run.agents.counterfactual_weight = 0.0
    config.run.agents.model_weight = 0.0
    config.run.collect.test_sessions = 1_024
    config.run.world.variant = "sparse" if "sparse" in words else "base"
    config.arms = ("production", "oracle_planning")
    config.holm = ("watch_time", "depth")
    return config
