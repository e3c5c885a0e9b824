"""`lorakit serve`: adapters over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import RUN
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
    help="Address to listen on; any but this machine's needs --token.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free port.")
@click.option(
    "--token", envvar="LORAKIT_TOKEN", help="Require `Authorization: Bearer TOKEN`; better set as LORAKIT_TOKEN."
)
@click.option(
    "--memory", type=click.IntRange(min=1), default=1024, show_default=True, help="MiB for adapters in memory."
)
@click.option(
    "--waiting",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="The most waiting texts; beyond it: 429.",
)
@click.option(
    "--inputs",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="The most texts in a request; beyond it: 413.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="Seconds to wait for an answer, or for an adapter to load.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What goes to stderr, in JSON: info has every request and its latency, debug also health checks.",
)
@click.option("--log-texts", is_flag=True, help="Log the texts of each request too, which may be private.")
@click.option("--dry-run", is_flag=True, help="Load the adapters, print what would be served, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print what is served as JSON.")
def serve(
    folders: tuple[Path, ...],
    host: str,
    port: int,
    token: str | None,
    log_level: str,
    log_texts: bool,
    dry_run: bool,
    as_json: bool,
    **limits: float,
) -> None:
    """Answer over HTTP with the adapters of RUNs, or of FOLDERs of them, all over one base model.

    \b
    lorakit serve runs/reviews
    curl 127.0.0.1:8080/predict -X POST -d '{"inputs":"I like you."}' -H 'Content-Type: application/json'

    The routes are text-embeddings-inference's /predict (with "adapter" to choose one), /metrics, /openapi.json, and a page.
    Adapters changed in or added to a FOLDER are served without a restart. Put a proxy (Caddy, nginx) in front of it
    if other people can reach it.
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
    )
