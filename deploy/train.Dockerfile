# Training and every other command. From the root of the repository, with the build of JAX that the machine needs (by
# default the one for CPUs; "jax[cuda12]" or "jax[tpu]"):
#
#   docker build -f deploy/train.Dockerfile --build-arg JAX="jax[cuda12]" -t mmrf-train .
FROM python:3.11-slim

ARG JAX=jax
# The client of the bucket that holds run folders: gcsfs for gs://, s3fs for s3://.
ARG STORAGE=gcsfs
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    JAX_COMPILATION_CACHE_DIR=/cache

# LightGBM, a baseline of real logs, is linked to OpenMP.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*

WORKDIR /mmrf_jax
COPY pyproject.toml README.md ./
COPY mmrf_jax mmrf_jax
# pyproject.toml has the ranges of versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[report,data,baselines]' "$JAX" "$STORAGE"
COPY launch launch
COPY experiments experiments

RUN useradd --uid 10001 mmrf && mkdir -p /cache /runs && chown mmrf /cache /runs
USER 10001
ENTRYPOINT ["python"]
CMD ["-m", "launch.train", "--config=experiments/world.py", "--workdir=/runs/world"]
