"""The sections of a recipe as types, for editors and type checkers. Made by scripts/reference.py. Do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Required, TypedDict


class ModelKeys(TypedDict, total=False):
    """The frozen base model."""

    base: Required[str]
    """hub id, folder, `minilm` or `t5-demo`"""
    revision: str | None
    """branch, tag or commit of a hub id"""
    adapter: str | None
    """a run or its adapter over the same base to begin from; [lora] is then that adapter's"""
    adapter_head: Literal["auto", "keep", "new"]
    """its output layer; auto: kept where the labels are the same"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    """auto: the faster one here; fp16 where a GPU emulates bf16"""
    dropout: float | None
    """of the base model; unset: from its config"""
    quantize: Literal["none", "int8", "nf4"]
    """how the frozen linear layers are stored"""
    kernels: Literal["auto", "plain"]
    """plain: modules run unchanged, as in transformers"""
    pooling: Literal["auto", "cls", "mean"]


class DataKeys(TypedDict, total=False):
    """Where the examples come from: a file, a pattern or URL of files, a folder saved by `datasets`, or a data set of the hub."""

    train: str | None
    validation: str | None
    """unset: a share of train, drawn by seed"""
    test: str | None
    format: str
    text: str | None
    """column names; unset: the usual ones, as a note states"""
    pair: str | None
    label: str | Sequence[str] | None
    """several columns: a 0 or 1, or a share, for each label"""
    negative: str | Sequence[str] | None
    """columns of texts that do not belong to the first one, for embeddings"""
    label_separator: str
    """between several labels in one cell"""
    overlaps: Literal["error", "longest"]
    """overlapping character spans: refuse, or keep the longest"""
    delimiter: str | None
    """of a table, or its name (tab); unset: detected, as a note states"""
    header: bool | None
    """false: the first line of a table is a record, and columns are named 1, 2, ..."""
    encoding: str | None
    """of text files; unset: UTF-8"""
    columns: Mapping[Literal["word", "tag"], int] | None
    """of CoNLL lines, counted from 1: {word = 2, tag = 3}; unset: detected"""
    on_bad: Literal["stop", "skip"]
    group: str | None
    """column (a document, a user) whose equal values stay on one side of the split"""
    folds: Literal["auto", 0] | int
    """of a cross-validation, 0 for none; auto: some below 500 examples"""
    validation_share: float
    """stratified by label; equal texts stay together"""
    max_length: int | None
    """tokens; unset: the model's limit, at most 512"""
    cache: str | None
    """folder, shared by runs, for encoded examples and downloaded files; unset: in memory"""


class TaskKeys(TypedDict, total=False):
    """What is learned. A key of another task is an error."""

    name: str
    metric: str | None
    """the score that chooses the best checkpoint; unset: the task's first"""
    class_weights: Literal["none", "balanced"] | Mapping[str, float]
    """in the loss; labels missing from a table have weight 1"""
    calibrate: bool
    """scale probabilities by a temperature tuned on the validation examples"""
    order: Sequence[str]
    """the labels from lowest to highest; unset: by value, if they are numbers"""
    prefix: str
    max_target_length: int
    """tokens of target or output"""
    num_beams: int
    """1: greedy; else beam search, as transformers' generate"""
    length_penalty: float
    """beams are compared by log-probability / length ** this; above 0 favours longer ones"""
    constrained: bool
    """restrict the decoder to words of the source and known types, or to labels"""
    format: Literal["list", "tanl"]
    """how entities are written"""
    stride: int | None
    """tokens shared by neighbouring windows; unset: max_length / 4"""
    subwords: Literal["first", "all"]
    """which sub-words of a word are trained; the first one predicts"""
    decoding: Literal["viterbi", "argmax"]
    """viterbi: the best valid IOB2 sequence"""
    crf: bool
    """a conditional random field over the tags of a sentence"""
    loss: str | None
    temperature: float
    """that cosines are divided by in the loss"""
    symmetric: bool
    """contrastive: also from each second text to the first ones"""
    dims: Sequence[int]
    """shorter vectors that are trained too, of the first so many dimensions (Matryoshka)"""
    normalize: bool | None
    """vectors of length 1; unset: as the base does"""
    query_prompt: str | None
    """before each first text of a pair, and each text of other data; unset: the base's"""
    document_prompt: str | None
    """before second texts and negatives"""


class LoraKeys(TypedDict, total=False):
    """The adapter. Keys have peft's names without the lora_ prefix."""

    r: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | str
    exclude_modules: Sequence[str] | str
    layers_to_transform: Sequence[int] | None
    use_rslora: bool
    use_dora: bool
    update: str
    """lora, dora (the same as use_dora), lora_fa, vera, adalora"""
    target_r: int | None
    """adalora: the average rank after pruning; unset: r / 2"""
    lora_bias: bool
    bias: Literal["none", "lora_only", "all"]
    """biases of the base that are trained"""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]]
    """rows of the input embedding, or of embeddings by name"""
    init: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: Sequence[str]
    """trained in full, in addition to the head and newly initialised layers"""


class TrainKeys(TypedDict, total=False):
    """How it is trained. A step is one optimizer update; `batch_size` is the number of examples in it, over all micro-batches."""

    method: Literal["lora", "full", "head"]
    epochs: int | None
    """unset: by the number of examples, as batch_size and lr"""
    max_steps: int | None
    """ends the run before `epochs` are done"""
    batch_size: int | None
    micro_batch_size: int | None
    """examples per forward; unset: the whole batch"""
    lr: float | None
    head_start: Literal["auto", "contrast", "probe", "random"]
    head_lr: float | None
    """of modules trained in full; unset: lr"""
    loraplus_lr_ratio: float
    """LoRA+: the learning rate of B over that of A"""
    warmup: float
    """below 1: a share of all steps; else a number of steps"""
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: float
    max_grad_norm: float
    seed: int
    seeds: Sequence[int]
    """in place of seed: a run for each, and the mean and spread of their scores"""
    eval_every: int | None
    """steps; unset: each epoch; with epochs unset 4 or 8 times"""
    checkpoint_every: int | None
    """steps; unset: with each evaluation"""
    patience: int | None
    """evaluations without a new best before stopping"""
    non_finite: Literal["stop", "skip"]
    """what to do at a step whose loss or gradient is not finite"""
    shard_base: bool
    """with several processes: shard the frozen layers over them (FSDP)"""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"]
    deterministic: bool
    """on a GPU: bitwise reproducible, by slower algorithms; on a CPU always"""


class OutputKeys(TypedDict, total=False):
    """Where the run folder goes, and which trackers log the run."""

    dir: str | None
    """unset: runs/<name of the recipe or data file>"""
    trackers: Sequence[Literal["tensorboard", "wandb", "mlflow", "trackio"]]
    project: str | None
    """the trackers' project; unset: from their environment variables, or lorakit"""


class Shortcuts(TypedDict, total=False):
    """Arguments of `lorakit.train` that stand for one key of a section."""

    r: int
    """lora.r"""
    alpha: float
    """lora.alpha"""
    target_modules: Sequence[str] | str
    """lora.target_modules"""
    epochs: int | None
    """train.epochs"""
    lr: float | None
    """train.lr"""
    batch_size: int | None
    """train.batch_size"""
    seed: int
    """train.seed"""
    validation_share: float
    """data.validation_share"""
    folder: str | Path | None
    """output.dir"""
