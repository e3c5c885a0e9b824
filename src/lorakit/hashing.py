"""Files that somebody else may have made: read within limits, and the sums that tell one base model from another."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.errors import ModelError, first_line

KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
MOST_DIGITS = 4_000  # of a whole number in JSON; Python reads 4,300


def proc(file: str, *names: str) -> str:
    """The first value under one of these names in a file of /proc; nothing on systems that are not Linux."""
    try:
        lines = Path("/proc", file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() in names)
    return next(values, "")


def user_cache(name: str) -> Path | None:
    """A folder for what can be made again, in the user's cache; None for a user without a home. It need not exist."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # then it is to be ignored (XDG base directories)
        try:
            home = Path.home() / ".cache"
        except RuntimeError:
            return None
    return home / "lorakit" / name if home.is_absolute() else None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its name at once when it is written: others may do the same meanwhile."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(unfinished)
        Path(unfinished).replace(path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def open_regular(path: Path, most: int | None = None) -> io.BufferedReader:
    """A file to read, of `most` bytes.

    Raises:
        OSError: it is missing, larger, or a folder, a pipe or a device, which may block or never end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes; at most {most:,} are read", str(path))
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: as `open_regular`.
        ValueError: it is not valid UTF-8, not JSON or not an object, or a key appears twice in it.
    """
    with open_regular(path, most) as stream:
        data = stream.read()
    try:
        raw = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_int=_int)
    except UnicodeDecodeError as err:
        raise ValueError(f"not valid UTF-8 at byte {err.start:,}") from err
    except json.JSONDecodeError as err:
        raise ValueError(f"not JSON: {err}") from err
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    if not isinstance(raw, dict):
        raise ValueError(f"holds {KINDS[type(raw)]}, not an object")
    if b"\\u" in data:  # which may write half of a pair, a text that nothing can print
        for key, value in raw.items():
            try:
                json.dumps({key: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as err:
                raise ValueError(f"{key!r} holds half of a surrogate pair, which is not valid Unicode") from err
    return raw


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys stand once each. Raises a ValueError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice in an object")
    return values


def _int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text says. Raises a ValueError (a TOMLDecodeError where it is not TOML) in one line."""
    try:
        return tomllib.loads(text)
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    except ValueError as err:
        if isinstance(err, tomllib.TOMLDecodeError):
            raise
        match = re.search(rf"\d[\d_]{{{MOST_DIGITS},}}", text)  # Python's own words are about a setting of Python's
        line = text[: match.start() if match else 0].count("\n") + 1
        raise ValueError(f"line {line}: a number of too many digits") from err


def file_sha256(path: Path, most: int | None = None) -> str:
    """sha256 of a file's bytes, in hexadecimal; errors as `open_regular`."""
    with open_regular(path, most) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """sha256 over the names and the bytes of the files of a folder and those below it, in hexadecimal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = (f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(sums).encode()).hexdigest()


# Fingerprints of base models

PARTS = {
    "weights": ("weights have", "the ones"),
    "config": ("config has", "the one"),
    "tokenizer": ("tokenizer has", "the one"),
}


MOST_HEADER = 10**8  # bytes of a safetensors file's header, as its library has it
REMEMBERED = 2**24  # bytes of a file from which on its sum is remembered, since computing it takes a while
SETTLED_S = 3.0  # a file changed so recently may change again without another time, which file systems round


class Fingerprint(NamedTuple):
    """What tells a base model from any that answers otherwise: a sha256 of each part; None where it is not known."""

    weights: str
    config: str | None = None  # but for names in it
    tokenizer: str | None = None  # what decides which ids a text has

    def differences(self, other: Fingerprint) -> list[str]:
        """A phrase for each part that is known of both and differs."""
        pairs = (
            (part, was, now) for part, was, now in zip(PARTS, self, other, strict=True) if was and now and was != now
        )
        return [
            f"its {PARTS[part][0]} sha256 {was[:12]}..., {PARTS[part][1]} found {now[:12]}..."
            for part, was, now in pairs
        ]


def weights_sha256(folder: Path) -> str:
    """sha256 over the safetensors files of a model folder, in name order.

    Raises:
        ModelError: there are none, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no weights: neither *.safetensors nor pytorch_model*.bin")
    for path in files:  # each is as long as its header says: seen before all of it is read
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(MOST_HEADER, size - 8):
                    raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
                header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            if end != size - 8 - length:
                raise ValueError(f"{size - 8 - length:,} bytes of tensors where the header says {end:,}")
        except OSError as err:
            raise ModelError(f"{path}: cannot be read: {err.strerror}") from err
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as err:
            raise ModelError(f"{path}: damaged: {first_line(err)}") from err
    digests = [_remembered_sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _remembered_sha256(path: Path) -> str:
    """sha256 of a file's bytes, from the user's cache folder where it was computed before and nothing about the file changed.

    An entry is a file of its own, written whole, so processes do not disturb each other; one that is damaged is not used.
    """
    stamp, cache = _stamp(path), user_cache("weights")
    if stamp["size"] < REMEMBERED or cache is None:
        return file_sha256(path)
    entry = cache / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(entry.read_bytes())
        if known["stamp"] == stamp and len(bytes.fromhex(known["sha256"])) == 32:
            return str(known["sha256"])
    sha256 = file_sha256(path)
    if stamp == _stamp(path) and time.time() - max(stamp["mtime_ns"], stamp["ctime_ns"]) / 1e9 > SETTLED_S:
        with suppress(OSError):  # a home that cannot be written
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_file(entry) as file:
                file.write_text(json.dumps({"stamp": stamp, "sha256": sha256}), encoding="utf-8")
    return sha256


def _stamp(path: Path) -> dict[str, int]:
    """What differs between a file and any other that stood in its place, or itself before it was written to."""
    status = path.stat()
    names = ("dev", "ino", "size", "mtime_ns", "ctime_ns")
    return {name: getattr(status, f"st_{name}") for name in names}


# Keys of config.json and of the tokenizer's files that change no answer: names, notes, and what we choose ourselves.
NAMES = {
    *("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "architectures", "auto_map", "dtype"),
    *("torch_dtype", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "gradient_checkpointing"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
    *("transformers.js_config", "model_max_length", "max_len", "chat_template", "processor_class", "tokenizer_file"),
    *("special_tokens_map_file", "backend", "is_local", "local_files_only", "version", "truncation", "padding"),
}
SPECIAL_TOKENS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Where a tokenizer without tokenizer.json, which else has all of it, keeps its vocabulary
VOCABULARY = (
    *("vocab.json", "merges.txt", "vocab.txt", "vocab.bpe", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json"),
    *("entity_vocab.json", "target_vocab.json", "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer"),
)


def fingerprint_of(folder: Path) -> Fingerprint:
    """What tells the model in a folder from any that answers otherwise, by its files alone.

    Raises:
        ModelError: there are no safetensors weights, or a JSON file is damaged.
    """
    if (folder / "tokenizer.json").exists():
        vocabulary: dict[str, Any] = {"tokenizer.json": _facts(folder / "tokenizer.json")}
    else:
        files = [path for path in folder.iterdir() if path.name in VOCABULARY or path.suffix in (".model", ".spm")]
        vocabulary = {path.name: file_sha256(path) for path in files}
    special = {name: _facts(folder / name) for name in SPECIAL_TOKENS if (folder / name).exists()}
    return Fingerprint(
        weights_sha256(folder), _json_sha256(_facts(folder / "config.json")), _json_sha256([vocabulary, special])
    )


def _facts(path: Path) -> dict[str, Any]:
    """What decides answers in a JSON file of a model's."""
    try:
        with open_regular(path) as file:
            raw = json.load(file)
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise ModelError(f"{path}: damaged: {first_line(err)}") from err
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: damaged: not a JSON object")
    return _without_names(raw)


def _without_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in raw.items() if key not in NAMES and value is not None}
    if isinstance(name := facts.get("tokenizer_class"), str):
        facts["tokenizer_class"] = name.removesuffix("Fast")  # as transformers 5 writes it again
    inner = [key for key, value in facts.items() if isinstance(value, dict) and key.endswith("_config")]
    return facts | {key: _without_names(facts[key]) for key in inner}


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
