"""Serve an exported ranker over HTTP, and log exposures and feedback.

  mmrf serve --artifact=artifacts/world --log=logs/served --port=8080

POST /rank requests a slate, POST /feedback reports the user's feedback on it, POST /items describes items that arrived
after the export; /docs describes all, /metrics is for Prometheus, / shows a feed. A ranker of the world is trained on
the log by `mmrf train --config=world --config.data.dir=logs/served --config.alternation.closed_loop=False`, one of
KuaiRand or of own logs by `--config.data.served`. If --artifact is a link that is moved to another artefact, the
service switches to it without dropping a request.

With --artifact_b a share of the users (--split) is served by another artefact; the log says who by which.

By default the service listens on this machine only; elsewhere (--host) it requires the token of --token_file.
"""

import gc
import ipaddress
import resource
import socket

from absl import flags

from mmrf_jax.cli import common
from mmrf_jax.io import extras
from mmrf_jax.io.progress import say

_ARTIFACT = common.define_path("artifact", None, "Folder of `mmrf export`, or a link to one.", required=True)
_LOG = common.define_path("log", "logs/served", "Folder of the feedback log and the users' state.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8080, "Port; 0 takes a free one and says which.", lower_bound=0, upper_bound=65535)
_TOKEN = common.define_path("token_file", None, "File with the token that requests must carry.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 serves the best slate; above, Plackett-Luce on standardised scores over it.", lower_bound=0.0
)
_CANDIDATES = flags.DEFINE_integer("max_candidates", 400, "Candidates of a request.", lower_bound=1, upper_bound=65535)
_GAP = flags.DEFINE_float("session_gap_minutes", 30.0, "After it a user begins a new session.", lower_bound=0.0)
_IN_FLIGHT = flags.DEFINE_integer("max_in_flight", 256, "Requests at once; 429 beyond.", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout", 5.0, "Seconds until a request is given up.", lower_bound=0.01)
_USERS = flags.DEFINE_integer(
    "users_in_memory", 20_000, "Users whose state is kept in memory, some 20 kB each.", lower_bound=1
)
_NEW = flags.DEFINE_integer(
    "max_new_items", 4_096, "Items that may arrive after the export and are ranked all the same.", lower_bound=0
)
_ARTIFACT_B = common.define_path("artifact_b", None, "Artefact of arm b of a traffic split, or a link to one.")
_SPLIT = flags.DEFINE_float("split", None, "Share of the users in arm b.", lower_bound=0.0, upper_bound=1.0)
_EXPERIMENT = flags.DEFINE_string("experiment", "split", "Name of the split; those of two names are independent.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws, with user and request.", lower_bound=0)

_FILES = 128  # files open in addition to connections


def main() -> None:
    with extras.needed("serve"):
        import uvicorn

        from mmrf_jax.serving import app, connections, guard, service
        from mmrf_jax.serving.demo import page
    token = _token()
    if (_ARTIFACT_B.value is None) != (_SPLIT.value is None):
        raise ValueError("--artifact_b and --split go together: the artefact of arm b, and its share of the users")
    family = socket.AF_INET6 if ":" in _HOST.value else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_HOST.value, _PORT.value))
    except OSError as error:
        raise ValueError(
            f"--host={_HOST.value} --port={_PORT.value} cannot be had ({error.strerror}); use another"
        ) from error
    made = service.Service(
        service.Settings(
            artifact=_ARTIFACT.value,
            log=_LOG.value,
            temperature=_TEMPERATURE.value,
            max_candidates=_CANDIDATES.value,
            session_gap=60.0 * _GAP.value,
            users_in_memory=_USERS.value,
            seed=_SEED.value,
            max_new_items=_NEW.value,
            artifact_b=_ARTIFACT_B.value,
            split=_SPLIT.value or 0.0,
            experiment=_EXPERIMENT.value,
        )
    )
    limits = guard.Limits(in_flight=_IN_FLIGHT.value, seconds=_TIMEOUT.value, token=token)
    # Exclude existing objects from garbage collection: scanning all of them blocks every request, for 50 ms with 2,000
    # users in memory. Reference counting still frees users' states, and young objects are still scanned.
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 1_000)
    listening.listen(1024)
    say(f"serving artefact {made.ranker.id} on http://{_HOST.value}:{listening.getsockname()[1]}")
    config = uvicorn.Config(
        app.make_app(
            made, limits, () if "string" in (made.ranker.video_ids, made.ranker.user_ids) else (page.router(made),)
        ),
        http=connections.protocol(_TIMEOUT.value, _room()),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        lifespan="on",
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _room() -> int:
    """Return the maximum number of connections: eight per request in flight, within the limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * _IN_FLIGHT.value
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted + _FILES:
        soft = wanted + _FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + _FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(wanted, max(soft - _FILES, 1))


def _token() -> str | None:
    """Return the token that requests must carry.

    Raises:
      ValueError: if the service would be open to other machines.
    """
    if _TOKEN.value is not None:
        token = _TOKEN.value.read_text().strip()
        if len(token) < 16 or not token.isascii() or any(c.isspace() for c in token):
            raise ValueError(f"--token_file={_TOKEN.value} must hold one ASCII word of 16 letters or more")
        return token
    try:
        loopback = ipaddress.ip_address(_HOST.value).is_loopback
    except ValueError:
        loopback = _HOST.value == "localhost"
    if not loopback:
        raise ValueError(
            f"--host={_HOST.value} can be reached by other machines; give --token_file=FILE, or use --host=127.0.0.1"
        )
    return None


def run() -> None:
    """Run this command."""
    common.run(main)
