"""`lorakit push`: what a run ships to a repository of the Hugging Face hub, and nothing else of its folder."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.app.arguments import RUN
from lorakit.app.printing import Output
from lorakit.errors import ConfigError, OutputError, first_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

CARD = "README.md"
SHIPPED = (".json", ".safetensors", ".txt", ".model", ".jinja")  # no .jsonl, no table: texts stay here
HTTP_CLIENTS = ("httpx", "httpcore", "requests")  # whose errors huggingface_hub lets through, by version


@click.command()
@click.argument("run", type=RUN)
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private. If it exists already, it must be private.")
@click.option(
    "--revision", metavar="BRANCH", help="Push to this branch, and create it if it is missing. Default: main."
)
@click.option("--dry-run", is_flag=True, help="List the files and their sizes, upload nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the files and the address as JSON.")
def push(run: Path, repo_id: str, private: bool, revision: str | None, dry_run: bool, as_json: bool) -> None:
    """Upload RUN's adapter with its card to the Hugging Face hub.

    REPO_ID is its name there. A fully fine-tuned run uploads its model instead. Checkpoints, predictions and
    training texts are not uploaded.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from lorakit.inference.adapter_folder import read_side, shipped_folder

    folder = shipped_folder(run)
    side = read_side(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as err:
        raise ConfigError(
            f"push: {repo_id!r} is not a repository; use NAMESPACE/NAME, for example you/reviews"
        ) from err
    every = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    sizes = {path.name: path.stat().st_size for path in every if path.suffix in SHIPPED or path.name == CARD}
    lines = [f"{size:>12,}  {name}" for name, size in sizes.items()]
    lines += [f"no {CARD} among them; `lorakit card RUN` writes one"] * (CARD not in sizes)
    if local := [name for name in (*side.data, side.base.name) if name.startswith(("/", "~"))]:
        lines.append(f"lorakit.json mentions files on this machine: {', '.join(local)}")
    output = Output(lines, {"repository": repo_id, "folder": str(folder), "files": sizes, "dry_run": dry_run})
    if dry_run:
        total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes, would go to {repo_id}"
        output = output.plus(Output([total], {}))
    else:
        url = _upload(folder, list(sizes), repo_id, private, revision)
        output = output.plus(Output([f"pushed: {url}"], {"url": url}))
    output.show(as_json)


def _upload(folder: Path, names: list[str], repo_id: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("push: HF_HUB_OFFLINE is set; unset it to reach the hub")
    if get_token() is None:
        raise ConfigError("push: no hub token; run `hf auth login`, or set HF_TOKEN to a token with write access")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ConfigError(f"push: {repo_id} exists and is public; choose another name, or leave out --private")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            revision=revision,
            commit_message="Upload what lorakit trained",
        )
    except ConfigError:
        raise
    except HfHubHTTPError as err:
        raise ConfigError(f"push: {repo_id}: {_refusal(err)}") from err
    except OfflineModeIsEnabled as err:
        raise ConfigError("push: HF_HUB_OFFLINE is set; unset it to reach the hub") from err
    except Exception as err:
        if not isinstance(err, OSError) and not type(err).__module__.startswith(HTTP_CLIENTS):
            raise
        raise OutputError(f"push: {api.endpoint} cannot be reached: {first_line(err)}; try again later") from err
    return str(done.commit_url)


def _refusal(err: HfHubHTTPError) -> str:
    """What the hub's refusal means, and what would help."""
    status = err.response.status_code if err.response is not None else 0
    known = {
        401: "the token is not valid; `hf auth login`, or set HF_TOKEN to a new one",
        403: "the token may not write there; create one with write access at https://huggingface.co/settings/tokens",
        404: "no such repository or namespace, or this token cannot see it; check the name",
    }
    return known.get(status, f"the hub answered {status}: {first_line(err, 'no message')}")
