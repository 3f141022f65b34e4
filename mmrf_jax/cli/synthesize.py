"""Write a synthetic log of any size in KuaiRand's official file layout, or as tables, for benchmarks and tests.

  mmrf synthesize --rows=2000 --variant=pure --out=logs/tiny
  mmrf synthesize --rows=50000000 --users=27285 --videos=5000000 --out=logs/synthetic
  mmrf synthesize --rows=100000 --users=1000 --videos=5000 --variant=pure --out=logs/small
  mmrf synthesize --rows=10000000 --layout=tables --out=logs/tables

Videos follow Zipf's law, sessions have 40 videos on average, and dates, rates, play times and durations are close to
those of the real logs; there is nothing to learn in it. The files depend on the flags only. 27k's log comes in parts.
"""

from absl import flags

from mmrf_jax.cli import common
from mmrf_jax.io.progress import counted

_ROWS = flags.DEFINE_integer(
    "rows", None, "Rows of the standard log; random rows come on top.", lower_bound=1, required=True
)
_OUT = common.define_path("out", None, "Folder to write; it must not exist.", required=True)
_USERS = flags.DEFINE_integer(
    "users", None, "Users; by default one for 50 rows, at most those of the release.", lower_bound=1
)
_VIDEOS = flags.DEFINE_integer(
    "videos", None, "Videos; by default as many as those rows of the release have.", lower_bound=1
)
_VARIANT = flags.DEFINE_enum("variant", "27k", ["pure", "1k", "27k"], "Release whose files it is to look like.")
_LAYOUT = flags.DEFINE_enum(
    "layout", "kuairand", ["kuairand", "tables"], "KuaiRand's files, or Parquet tables and a schema for --config=logs."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything.", lower_bound=0)


def main() -> None:
    from mmrf_jax.data.readers import kuairand

    out = _OUT.value
    if out.exists():
        raise ValueError(f"--out={_OUT.value} exists; name a folder that does not")
    common.check_output("out", out)
    log = kuairand.SyntheticLog(_ROWS.value, _USERS.value, _VIDEOS.value, _VARIANT.value, _SEED.value)
    log.write(out, counted, _LAYOUT.value)
    print(f"{_ROWS.value:,} rows -> {out}")


def run() -> None:
    """Run this command."""
    common.run(main, devices=False)
