"""An engine that runs the tasks of `prepare` on Apache Beam, on several machines with a shared file system.

Beam is an extra: pip install 'mmrf_jax[beam]'. A stage is one pipeline; its tasks are distributed, and repeated
if a machine is lost. Tasks publish their files by renames, so running a task twice is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from mmrf_jax.data.readers.kuairand.job import Engine, Job, Task


def pipelines(options: Sequence[str] = ()) -> Engine:
    """Return an engine that runs each stage as a pipeline with `options` (`--runner=…`; default: Beam's local one)."""

    def engine(task: Task, job: Job, todo: Sequence[int], done: Callable[[int], None]) -> None:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            tasks = pipeline | beam.Create(list(todo)) | beam.Reshuffle()
            tasks | beam.Map(lambda i: task(job, i))
        done(len(todo))

    return engine
