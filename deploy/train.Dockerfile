# Training and every other main. From the root of the repository, with the build of JAX that the machine needs (none for
# CPUs, cuda12, tpu):
#
#   docker build -f deploy/train.Dockerfile --build-arg JAX_EXTRA=cuda12 -t mmrf-train .
FROM python:3.11-slim

ARG JAX_EXTRA=""
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    JAX_COMPILATION_CACHE_DIR=/cache

# LightGBM, a baseline of real logs, is linked to OpenMP.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*

WORKDIR /mmrf_jax
COPY requirements.txt requirements-serve.txt ./
# The range of requirements.txt holds for every build of JAX.
RUN pip install --no-cache-dir -r requirements.txt \
    && if [ -n "$JAX_EXTRA" ]; then \
         pip install --no-cache-dir -r requirements.txt "jax[$JAX_EXTRA]"; \
       fi
COPY mmrf_jax mmrf_jax
COPY launch launch
COPY experiments experiments

RUN useradd --uid 10001 mmrf && mkdir -p /cache /runs && chown mmrf /cache /runs
USER 10001
ENTRYPOINT ["python"]
CMD ["-m", "launch.train", "--config=experiments/world.py", "--workdir=/runs/world"]
