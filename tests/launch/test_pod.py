"""The benchmark `pod`: bytes of collectives in a program's text, and of a log in memory."""

import dataclasses

import numpy as np
import random_logs

from mmrf_jax.cli.benchmarks import pod


def test_bytes_of_collectives_by_hand():
    text = """
  %sum = f32[32,64]{1,0} all-reduce(f32[32,64]{1,0} %x), channel_id=1
  %two = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=2
  %begun = u32[5]{0} all-gather-start(u32[1]{0} %c), dimensions={0}
  %flags = pred[7]{0} collective-permute(pred[7]{0} %d)
  %scalar = f32[] all-reduce(f32[] %e)
  %other = f32[9]{0} add(f32[9]{0} %all-reduce.1, f32[9]{0} %g)
"""
    assert list(pod._collectives(text)) == [4 * 32 * 64, 4 * 8 + 2 * 6, 4 * 5, 7, 4]


def test_bytes_of_a_log_are_those_of_its_arrays():
    log = random_logs.make_log(0, 40)
    values = {name: value for name, value, _ in pod._logged(random_logs.SPEC)}
    fields = [getattr(log, field.name) for field in dataclasses.fields(log)]
    arrays = [x for x in fields if isinstance(x, np.ndarray) and x is not log.scores]
    session, request = values["log, a session without its requests"], values["log, a request"]
    last = log.offsets.itemsize  # one more than sessions
    assert sum(x.nbytes for x in arrays) == session * log.num_sessions + request * log.num_requests + last
