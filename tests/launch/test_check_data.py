"""`launch.check_data` as a user starts it."""

import own_logs
import polars as pl
from processes import error_line

from mmrf_jax import schema as schemas
from mmrf_jax.data.frame_log import describe_log

SCHEMA = """
import mmrf_jax as mmrf

schema = mmrf.Schema(
    user="user_id", item="item_id", time="ts", request="req", signals=[mmrf.Signal("like", column="liked")]
)
"""


def test_a_log_is_described_and_a_fault_is_one_line(launch, tmp_path):
    log = own_logs.make_log(300)["log"]
    (tmp_path / "schema.py").write_text(SCHEMA)
    log.write_parquet(tmp_path / "log.parquet")
    args = (f"--config.data.path={tmp_path}/*.parquet", f"--config.data.schema={tmp_path}/schema.py")
    args += (f"--config.data.cache_dir={tmp_path}/cache",)
    done = launch("check_data", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout == describe_log(log, schemas.load(tmp_path / "schema.py")) + "\n"
    assert "300 of 300 rows are used" in done.stdout and not done.stderr
    log.with_columns(liked=pl.lit(3)).write_parquet(tmp_path / "log.parquet")
    done = launch("check_data", *args)
    assert done.returncode == 2 and "column 'liked' of the binary signal 'like' has 3 in row 0" in error_line(done)
    assert "config.data.path is empty; use --config.data.path=PATH" in error_line(launch("check_data"))
