"""Which modules an adapter changes. An entry that matches nothing is an error that lists what there is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from torch import nn

from lorakit.errors import ConfigError, did_you_mean
from lorakit.lora.config import ALL_LINEAR, LoraConfig
from lorakit.lora.layers import AdapterHost, Layer
from lorakit.lora.safe_regex import Pattern
from lorakit.lora.target_presets import with_presets
from lorakit.lora.weight_layouts import LINEAR, TRANSPOSED, geometry_of, matrix_shape

OUT_PROJ = ".base.out_proj"  # the output projection of an nn.MultiheadAttention, adapted together with it
INTERLEAVED = ("query_key_value",)  # GPT-NeoX and BLOOM mix q, k and v head by head
HEADS = frozenset({"classifier", "score", "qa_outputs", "lm_head", "embed_out"})  # never targets of all-linear


class Target(NamedTuple):
    """A layer to adapt: its path, the entry that matched it, and its rank and alpha.

    >>> target = select_targets(model, LoraConfig(r=4, lora_alpha=8, target_modules=("query",)))[0]
    >>> target.matched_by, target.r, target.alpha
    ('query', 4, 8.0)
    """

    path: str
    matched_by: str
    r: int
    alpha: float
    parts: str = ""  # which of q, k and v in a fused projection; empty means the whole layer


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every (path, module) as in the model before any adapter: hosts are included, their inner modules are not."""
    yield prefix, module
    if not isinstance(module, (AdapterHost, nn.MultiheadAttention)):  # the latter never calls its out_proj
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}.{name}" if prefix else name)


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers an adapter could touch (linear, embedding, convolution), by path, wrapped or not.

    >>> list(adaptable_layers(model))[:2]
    ['bert.embeddings.word_embeddings', 'bert.embeddings.position_embeddings']
    """
    layers = ((path, module.base if isinstance(module, Layer) else module) for path, module in walk(model))
    # not the root, which has no parent to replace it in
    return {path: module for path, module in layers if path and geometry_of(module) is not None}


def trainable_row_modules(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """path -> the rows to train of that embedding, as `trainable_token_indices` says.

    Tied embeddings train their rows together, under the path of the first.

    Raises:
        ConfigError: a name matches no embedding, the model has no input embedding, an index is out of range, or two tied
            embeddings are to train different rows.
    """
    rows = config.trainable_token_indices
    embeddings = {path: plain(m) for path, m in walk(model) if isinstance(plain(m), nn.Embedding)}
    if not rows:
        return {}
    if not isinstance(rows, Mapping):
        main = getattr(model, "get_input_embeddings", lambda: None)()
        chosen = {path: tuple(rows) for path, module in walk(model) if module is main and path in embeddings}
        if not chosen:
            raise ConfigError(f"trainable_token_indices: name the embedding; there are {', '.join(embeddings)}")
    else:
        chosen = {}
        for name, indices in rows.items():
            matches = [path for path in embeddings if has_suffix(path, name)]
            if not matches:
                raise ConfigError(
                    f"trainable_token_indices: nothing matches {name!r}; {did_you_mean(name, embeddings)}"
                )
            for path in matches:
                tied = tied_to(model, path)
                first = next(place for place in embeddings if place in tied)
                if chosen.setdefault(first, tuple(indices)) != tuple(indices):
                    raise ConfigError(
                        f"trainable_token_indices: {first} and the embeddings tied to it must have the same rows"
                    )
    for path, indices in chosen.items():
        size = len(embeddings[path].weight)
        if max(indices) >= size:
            raise ConfigError(f"trainable_token_indices: {max(indices)} is not in {path}, which has {size} rows")
    return chosen


def tied_to(model: nn.Module, path: str) -> list[str]:
    """The paths of all modules that share their weight with the one at `path`, which comes first."""
    weight = _own_weight(model.get_submodule(path))
    return [path, *(p for p, m in walk(model) if p != path and _own_weight(m) is weight)]


def _own_weight(module: nn.Module) -> Any:
    """The weight of a module, for a host before merging."""
    weight = getattr(plain(module), "weight", None)
    return module.originals.get("weight", weight) if isinstance(module, AdapterHost) else weight


def embeddings_in_place_of(model: nn.Module) -> tuple[str, list[str]]:
    """The path of the main embedding that the model never calls itself (T5's and BART's `shared`), and those it calls.

    Both are empty in other models.
    """
    main = getattr(model, "get_input_embeddings", lambda: None)()
    path = next((path for path, module in walk(model) if main is not None and plain(module) is plain(main)), "")
    tied = tied_to(model, path)[1:] if path else []
    called = [place for place in tied if isinstance(plain(model.get_submodule(place)), nn.Embedding)]
    return (path, called) if called else ("", [])


def plain(module: nn.Module) -> Any:
    """The module itself, or the base module of a host."""
    return module.base if isinstance(module, AdapterHost) else module


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear ones among them, GPT-2's Conv1D included: the candidates of all-linear.

    >>> list(linear_layers(model))[:2]
    ['bert.encoder.layer.0.attention.self.query', 'bert.encoder.layer.0.attention.self.key']
    """
    return {path: m for path, m in adaptable_layers(model).items() if geometry_of(m) in (LINEAR, TRANSPOSED)}


def has_suffix(path: str, name: str) -> bool:
    """Whether `name` is the path or its last dotted parts: `query` is a suffix of `a.query`, not of `a.my_query`."""
    return path == name or path.endswith("." + name)


def select_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The layers that `config` adapts, in the model's order; matching as in peft, but unmatched entries are errors.

    all-linear skips layers that are too small for r (such as ESM's one-output contact regression), unless all are.

    >>> select_targets(model, LoraConfig(r=4, target_modules=("query",)))[0]
    Target(path='bert.encoder.layer.0.attention.self.query', matched_by='query', r=4, alpha=16.0, parts='')

    Raises:
        ConfigError: an entry of target_modules, exclude_modules, layers_to_transform, rank_pattern or
            alpha_pattern matches nothing, or a preset is not known for this family of models.
    """
    config = with_presets(model, config)
    layers, candidates = adaptable_layers(model), _candidates(model, config)
    if config.target_modules == ALL_LINEAR:
        linear = linear_layers(model)
        output = getattr(model, "get_output_embeddings", lambda: None)()
        heads = {path for path in linear if not HEADS.isdisjoint((path.split(".")[0], path.split(".")[-1]))}
        matched = {
            path: ALL_LINEAR
            for path in candidates
            if path in linear and path not in heads and linear[path] is not output
        }
    else:
        matched = _match("target_modules", config.target_modules, candidates)
    main, called = embeddings_in_place_of(model)
    if main in matched:
        matched = {
            path: matched.get(path, main) for path in candidates if path in called or path in matched.keys() - {main}
        }
    if config.exclude_modules:
        excluded = _match("exclude_modules", config.exclude_modules, candidates)
        matched = {path: by for path, by in matched.items() if path not in excluded}
    if config.layers_to_transform is not None:
        blocks = sorted({i for i in map(_layer_index, matched) if i is not None})
        for index in config.layers_to_transform:
            if index not in blocks:
                span = f"{blocks[0]} to {blocks[-1]}" if blocks else "none"
                raise ConfigError(f"layers_to_transform: no targeted layer lies in block {index}; blocks: {span}")
        matched = {path: by for path, by in matched.items() if _layer_index(path) in config.layers_to_transform}
    if config.target_modules and not matched:
        raise ConfigError(f"target_modules = {config.target_modules!r}: no layer is left after the other settings")
    adapted = {path: layers[path] for path in matched}
    ranks = _by_pattern("rank_pattern", config.rank_pattern, adapted)
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern, adapted)
    targets: list[Target] = []
    for path, by in matched.items():
        r, alpha = int(ranks.get(path, config.r)), float(alphas.get(path, config.lora_alpha))
        parts = "" if isinstance(config.target_modules, str) else _fused_parts(path, by, layers[path])
        targets.append(Target(path, by, r, alpha, parts))
        if isinstance(layers[path], nn.MultiheadAttention):
            targets.append(Target(path + OUT_PROJ, by, r, alpha))
    if config.target_modules == ALL_LINEAR:  # not those too small for r, unless a pattern has given them another rank
        large = [t for t in targets if t.r != config.r or t.r <= min(matrix_shape(layers[t.path]))]
        return large or targets
    return targets


def passed_by(model: nn.Module, config: LoraConfig) -> list[str]:
    """The layers that all-linear skips since they are too small for r."""
    if config.target_modules != ALL_LINEAR:
        return []
    chosen = {target.path for target in select_targets(model, config)}
    every = {target.path for target in select_targets(model, dataclasses.replace(config, r=1, rank_pattern={}))}
    return [path for path in linear_layers(model) if path in every - chosen]


def _candidates(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that are not saved in full."""
    saved = saved_modules(model, config.modules_to_save)
    layers = adaptable_layers(model)
    return {p: m for p, m in layers.items() if not any(p == s or p.startswith(s + ".") for s in saved)}


def without_idle_entries(model: nn.Module, config: LoraConfig, adapted: Set[str]) -> LoraConfig:
    """The settings of a file without entries that have no effect in this model, which peft allows and we do not.

    `adapted` are the paths for which the file has an update; a target that matches no such layer is dropped too.
    """
    config = with_presets(model, config)
    candidates = _candidates(model, config)
    main, _ = embeddings_in_place_of(model)
    targets, excluded, layers = config.target_modules, config.exclude_modules, config.layers_to_transform
    if targets == ALL_LINEAR or (isinstance(targets, str) and main in adapted):
        paths = linear_layers(model) if targets == ALL_LINEAR else _matching("target_modules", targets, candidates)
        targets = tuple(path for path in paths if path in adapted and path != main) or targets
    elif not isinstance(targets, str):
        used = [path for path in candidates if path in adapted and path != main]
        targets = tuple(name for name in targets if any(has_suffix(path, name) for path in used)) or targets
    if isinstance(excluded, str):
        excluded = excluded if _matching("exclude_modules", excluded, candidates) else ()
    else:
        excluded = tuple(name for name in excluded if any(has_suffix(path, name) for path in candidates))
    bare = dataclasses.replace(
        config,
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=None,
        rank_pattern={},
        alpha_pattern={},
    )
    chosen = [target.path for target in select_targets(model, bare)]
    if layers is not None:
        there = {_layer_index(path) for path in chosen}
        layers = tuple(index for index in layers if index in there) or layers
        chosen = [path for path in chosen if _layer_index(path) in layers]
    ranks = {n: r for n, r in config.rank_pattern.items() if _matching("rank_pattern", suffix_pattern(n), chosen)}
    alphas = {n: a for n, a in config.alpha_pattern.items() if _matching("alpha_pattern", suffix_pattern(n), chosen)}
    return dataclasses.replace(bare, layers_to_transform=layers, rank_pattern=ranks, alpha_pattern=alphas)


def saved_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The paths of the modules that `modules_to_save` names, by suffix; an entry without one is a ConfigError."""
    paths = [path for path, _ in walk(model) if path]
    chosen: dict[str, None] = {}
    for name in names:
        matches = [path for path in paths if has_suffix(path, name)]
        if not matches:
            hint = did_you_mean(name, {path.rpartition(".")[2] for path in paths})
            raise ConfigError(f"modules_to_save: nothing matches {name!r}; {hint}")
        chosen.update(dict.fromkeys(matches))
    # an inner module of a saved one is saved with it
    return [path for path in chosen if not any(path.startswith(other + ".") for other in chosen)]


def _match(key: str, names: str | Sequence[str], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """path -> the entry of `names` that matched it, in the order of `layers`."""
    if isinstance(names, str):
        matches = dict.fromkeys(_matching(key, names, layers), names)
        if not matches:
            raise ConfigError(
                f"{key}: the pattern {names!r} matches no whole path such as {next(iter(layers), '(none)')!r}; "
                f"for a name give a list: [{names!r}]"
            )
        return matches
    by: dict[str, str] = {}
    for entry in names:
        name = entry.partition(":")[0]
        paths = [path for path in layers if has_suffix(path, name)]
        if not paths:
            raise ConfigError(f"{key}: nothing matches {name!r}; {_near(name, layers)}")
        for path in paths:
            by.setdefault(path, entry)
    return {path: by[path] for path in layers if path in by}


def _near(name: str, layers: Mapping[str, nn.Module]) -> str:
    """A hint: names near `name`, the number of linear layers, and all their names."""
    linear = [path for path, module in layers.items() if geometry_of(module) in (LINEAR, TRANSPOSED)]
    kinds = sorted({path.rpartition(".")[2] for path in linear})
    others = sorted({path.rpartition(".")[2] for path in layers} - set(kinds))
    there = f"{len(linear) or 'no'} linear layers{': ' * bool(kinds)}{', '.join(kinds)}"
    there += f"{'; also ' * bool(others)}{', '.join(others)}"
    hint = did_you_mean(name, [*kinds, *others])
    return f"{hint} ({there})" if hint.startswith("did") else f"there are {there}"


def _matching(key: str, pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that match as a whole. Patterns may come from downloaded adapters: one that takes too long is refused."""
    try:
        compiled = Pattern(pattern)
        return [path for path in paths if compiled.fullmatch(path)]
    except re.error as err:
        raise ConfigError(f"{key}: {pattern[:80]!r} is not a regular expression that can be used: {err}") from err


def suffix_pattern(name: str) -> str:
    """A key of rank_pattern or alpha_pattern as a regular expression over whole paths, as peft reads it."""
    return rf"(?:.*\.)?(?:{name})"


def _layer_index(path: str) -> int | None:
    """The index of the block that the path lies in: its first number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _fused_parts(path: str, entry: str, layer: nn.Module) -> str:
    """The letters after the colon of `c_attn:qv`, for a layer that computes q, k and v one after the other."""
    name, colon, parts = entry.partition(":")
    if not colon:
        return ""
    d_out, d_in = matrix_shape(layer)
    if not parts or set(parts) - set("qkv") or len(set(parts)) < len(parts):
        raise ConfigError(f"target_modules: {entry!r}: after the colon write some of the letters q, k and v")
    if d_out != 3 * d_in or name.rpartition(".")[2] in INTERLEAVED:
        raise ConfigError(f"target_modules: {entry!r}: {path} ({d_out} x {d_in}) is not q, k and v stacked")
    return parts


def _by_pattern(key: str, pattern: Mapping[str, float], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """path -> value of the first entry that matches it: as a suffix read as a regular expression, like peft."""
    chosen: dict[str, float] = {}
    for name, value in pattern.items():
        matches = _matching(key, suffix_pattern(name), layers)
        if not matches:
            raise ConfigError(f"{key}: nothing matches {name!r}; {_near(name, layers)}")
        for path in matches:
            chosen.setdefault(path, value)
    return chosen


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The plain layer at a target's path, also inside an attention that is not wrapped yet."""
    outer = path.removesuffix(OUT_PROJ)
    if outer != path and isinstance(plain(model.get_submodule(outer)), nn.MultiheadAttention):
        return plain(plain(model.get_submodule(outer)).out_proj)  # type: ignore[no-any-return]
    return plain(model.get_submodule(path))  # type: ignore[no-any-return]


def check_ranks(model: nn.Module, targets: Iterable[Target]) -> None:
    """Raise a ConfigError for a rank above its layer's smaller side, which has no benefit."""
    for target in targets:
        smaller = min(matrix_shape(layer_at(model, target.path)))
        if target.r > smaller:
            raise ConfigError(f"r = {target.r} is more than {target.path} can use: its smaller side is {smaller}")
