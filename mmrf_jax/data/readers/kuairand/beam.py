"""The tasks of `prepare` on Apache Beam: on as many machines as its runner has, over files that all of them see.

Beam is an extra: pip install -r requirements-beam.txt. A stage is one pipeline, whose tasks are spread, and repeated
where a machine is lost; tasks leave their files by renames, so a task that is run twice does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from mmrf_jax.data.readers.kuairand.job import Engine, Job, Task


def pipelines(options: Sequence[str] = ()) -> Engine:
    """Runs each stage as a pipeline with these options (`--runner=…`); Beam's local runner by default."""

    def engine(task: Task, job: Job, todo: Sequence[int], done: Callable[[int], None]) -> None:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            tasks = pipeline | beam.Create(list(todo)) | beam.Reshuffle()
            tasks | beam.Map(lambda i: task(job, i))
        done(len(todo))

    return engine
