"""`lorakit push`: what a run ships to a repository of the Hugging Face hub, and nothing else of its folder."""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lorakit.app.card import FILE
from lorakit.app.printing import Output
from lorakit.errors import ConfigError, OutputError, first_line
from lorakit.inference.adapter_folder import read_side, shipped_folder

SHIPPED = (".json", ".safetensors", ".txt", ".model", ".jinja")  # no .jsonl, no table: texts stay here

HTTP_CLIENTS = ("httpx", "httpcore", "requests")  # whose errors huggingface_hub lets through, by version


def push(
    run: Path, repo_id: str, *, private: bool = False, revision: str | None = None, dry_run: bool = False
) -> Output:
    """Upload the adapter of a run (after full fine-tuning: its model); `revision` is a branch, made where it is not there.

    Raises:
        OutputError: there is no such run, or the hub cannot be reached.
        ConfigError: `repo_id` is none, there is no token, or it may not write there.
    """
    folder = shipped_folder(run)
    side = read_side(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as err:
        raise ConfigError(f"push: {repo_id!r} is no repository; say NAMESPACE/NAME, for example you/reviews") from err
    files = shipped_files(folder)
    sizes = {path.name: path.stat().st_size for path in files}
    lines = [f"{size:>12,}  {name}" for name, size in sizes.items()]
    lines += [f"no {FILE} among them; `lorakit card RUN` writes one"] * (FILE not in sizes)
    if told := [name for name in (*side.data, side.base.name) if name.startswith(("/", "~"))]:
        lines.append(f"lorakit.json in it names files of this machine: {', '.join(told)}")
    facts = {"repository": repo_id, "folder": str(folder), "files": sizes, "dry_run": dry_run}
    if dry_run:
        total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes, would go to {repo_id}"
        return Output([*lines, total], facts)
    url = _upload(folder, list(sizes), repo_id, private, revision)
    return Output([*lines, f"pushed: {url}"], {**facts, "url": url})


def shipped_files(folder: Path) -> list[Path]:
    """What of the folder belongs to what ships, whatever else somebody has put there."""
    found = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in found if path.suffix in SHIPPED or path.name == FILE)


def _upload(folder: Path, names: list[str], repo_id: str, private: bool, revision: str | None) -> str:
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("push: HF_HUB_OFFLINE is set; unset it to reach the hub")
    if get_token() is None:
        raise ConfigError("push: no token of the hub; `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ConfigError(f"push: {repo_id} exists and is public; choose another name, or leave --private out")
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
        raise OutputError(
            f"push: {api.endpoint} cannot be reached: {first_line(err)}; nothing is lost, try again"
        ) from err
    return str(done.commit_url)


def _refusal(err: HfHubHTTPError) -> str:
    """What the hub's refusal means, and what would help."""
    status = err.response.status_code if err.response is not None else 0
    known = {
        401: "the token is not valid; `hf auth login`, or set HF_TOKEN to a new one",
        403: "the token may not write there; make one with the right to write at https://huggingface.co/settings/tokens",
        404: "no such repository or namespace, or it is hidden from this token; see to its name",
    }
    return known.get(status, f"the hub answered {status}: {first_line(err, 'no message')}")
