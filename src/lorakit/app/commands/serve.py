"""`lorakit serve`: adapters over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import DEVICE, RUN
from lorakit.app.printing import begin, echo
from lorakit.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MIB = 2**20


@click.command()
@click.argument("folders", type=RUN, nargs=-1, required=True, metavar="RUN|FOLDER ...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Any address other people can reach needs --token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
@click.option(
    "--token",
    envvar="LORAKIT_TOKEN",
    help="Require `Authorization: Bearer TOKEN`. It is safer to set it in LORAKIT_TOKEN.",
)
@click.option(
    "--memory", type=click.IntRange(min=1), default=1024, show_default=True, help="Memory for adapters, in MiB."
)
@click.option(
    "--waiting",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Refuse requests (429) while this many texts are waiting.",
)
@click.option(
    "--inputs",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Refuse requests (413) with more texts than this.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="How many seconds an answer, or loading an adapter, may take.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What to log to stderr, in JSON. info logs every request with its latency, debug also health checks.",
)
@click.option("--log-texts", is_flag=True, help="Log the texts of each request too. They may be private.")
@DEVICE
@click.option("--dry-run", is_flag=True, help="Load the adapters, print what would be served, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print what is served as JSON.")
def serve(
    folders: tuple[Path, ...],
    host: str,
    port: int,
    token: str | None,
    log_level: str,
    log_texts: bool,
    device: str,
    dry_run: bool,
    as_json: bool,
    **limits: float,
) -> None:
    """Serve the adapters of RUNs, or of FOLDERs of runs, over HTTP.

    They all share one base model.

    \b
    lorakit serve runs/reviews
    curl 127.0.0.1:8080/predict -X POST -d '{"inputs":"I like you."}' -H 'Content-Type: application/json'

    The routes are text-embeddings-inference's /predict (choose an adapter with "adapter"), /metrics, /openapi.json, and a
    page to try it in a browser. Adapters that are added to a FOLDER, or change, are served without a restart.
    If other people can reach the server, put a proxy (Caddy, nginx) in front of it.
    """
    if host not in LOOPBACK and not token:
        raise ConfigError(f"--host {host}: reachable from other machines; set --token or LORAKIT_TOKEN")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise ConfigError("--token: use visible ASCII characters")
    begin(f"loading {', '.join(map(str, folders))}")
    try:
        from lorakit.app.server.process import run
    except ImportError as err:
        raise ConfigError(f"serve needs {err.name}: pip install 'lorakit[serve]'") from err

    def say(facts: dict[str, object]) -> None:
        names = facts["adapters"]
        assert isinstance(names, list)
        lines = f"serving {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)}) over {facts['base']}"
        echo(json.dumps(facts) if as_json else f"{lines}\n{facts['url']}")

    run(
        folders,
        (host, port),
        token,
        limits={**limits, "memory": limits["memory"] * MIB},
        say=say,
        dry_run=dry_run,
        log_level=log_level,
        log_texts=log_texts,
        device=device,
    )
