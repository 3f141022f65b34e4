# The ranking service. From the root of the repository:
#
#   docker build -f deploy/serve.Dockerfile -t mmrf-serve .
#
# It needs an artefact at /artifacts/world, a token at /run/secrets/token, and a writable /logs.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    JAX_PLATFORMS=cpu \
    JAX_COMPILATION_CACHE_DIR=/cache

WORKDIR /mmrf_jax
COPY pyproject.toml README.md ./
COPY mmrf_jax mmrf_jax
# pyproject.toml has the ranges of versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[serve]'

RUN useradd --uid 10001 mmrf && mkdir -p /cache /logs && chown mmrf /cache /logs
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["mmrf", "serve"]
CMD ["--artifact=/artifacts/world", "--log=/logs/served", "--host=0.0.0.0", "--port=8080", "--token_file=/run/secrets/token"]
