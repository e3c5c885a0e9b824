"""What tells a base model from any other that would answer otherwise, from its files alone; without transformers."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, first_line
from lorakit.hashing import Fingerprint, file_sha256, open_regular, user_cache

MOST_HEADER = 10**8  # bytes of a safetensors file's header, as its library has it
REMEMBERED = 2**24  # bytes of a file from which on its sum is remembered, since computing it takes a while
SETTLED_S = 3.0  # a file changed so recently may change again without another time, which file systems round


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
            with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
                json.dump({"stamp": stamp, "sha256": sha256}, file)
            Path(file.name).replace(entry)
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
