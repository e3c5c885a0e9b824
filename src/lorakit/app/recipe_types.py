"""The sections of a recipe as types, for editors and type checkers. Made by scripts/reference.py. Do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Required, TypedDict


class ModelKeys(TypedDict, total=False):
    """The frozen base model."""

    base: Required[str]
    """A hub id, a folder, `minilm` or `t5-demo`."""
    revision: str | None
    """A branch, tag or commit of a hub id."""
    adapter: str | None
    """Start from this run or adapter on the same base. [lora] is then taken from it."""
    adapter_head: Literal["auto", "keep", "new"]
    """Whether to keep the output layer of `adapter`. auto: keep it if the labels are the same."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    """How the frozen base is stored. auto: the fastest on this machine, or fp16 if the GPU only emulates bf16."""
    dropout: float | None
    """Dropout of the base model. Default: from its config, or none below 500 examples."""
    quantize: Literal["none", "int8", "nf4"]
    """How the frozen linear layers are stored."""
    kernels: Literal["auto", "plain"]
    """auto: use faster modules where they fit. plain: run every module unchanged, as in transformers."""
    pooling: Literal["auto", "cls", "mean"]
    """What a classifier reads. cls: what its model family does; mean: the mean over tokens; auto: what the checkpoint says."""


class DataKeys(TypedDict, total=False):
    """Where the examples come from: a file, a pattern or URL of files, a folder saved by `datasets`, or a data set of the hub."""

    train: str | None
    """The training data."""
    validation: str | None
    """The validation data. Default: a share of the training data."""
    test: str | None
    """Data to score once, at the end."""
    format: str
    """The format of the files. auto: guessed from name and content."""
    text: str | None
    """Column of the text. Default: a common name, which a note prints."""
    pair: str | None
    """Column of the second text, for pairs."""
    label: str | Sequence[str] | None
    """Column of the label. For several columns: a 0 or 1, or a share, for each label."""
    negative: str | Sequence[str] | None
    """Columns of texts that do not belong to the first text, for embeddings."""
    choices: str | Sequence[str] | None
    """Columns of the answers to choose from: one column of lists, or one column for each. Default: common names."""
    answers: Literal["name", "text", "from_0", "from_1"] | None
    """How the label names the right choice: by letter or name, by text, or by number. Default: guessed, which a note prints."""
    label_separator: str
    """Separates several labels in one cell."""
    overlaps: Literal["error", "longest"]
    """What to do if character spans overlap: stop, or keep the longest."""
    delimiter: str | None
    """Separator of a table, or its name (tab). Default: guessed, which a note prints."""
    header: bool | None
    """false: the table has no header, and its columns are called 1, 2, ..."""
    encoding: str | None
    """Encoding of text files. Default: UTF-8."""
    columns: Mapping[Literal["word", "tag"], int] | None
    """Columns of CoNLL files, counted from 1: {word = 2, tag = 3}. Default: guessed."""
    on_bad: Literal["stop", "skip"]
    """What to do with bad records: stop and list them, or skip them."""
    group: str | None
    """Column (a document, a user) whose rows must stay on the same side of the split."""
    folds: Literal["auto", 0] | int
    """Folds for cross-validation, or 0 for none. auto: 2 or 3 below 500 examples without validation data."""
    validation_share: float
    """Share to hold out. Stratified by label; identical texts stay together."""
    label_names: bool | None
    """Also train on each label's name, as a text. Default: up to 20 texts per label, if names are words."""
    max_length: int | None
    """Longest text in tokens. Default: the model's limit, at most 512."""
    cache: str | None
    """Folder for encoded examples and downloaded files, shared by runs. Default: keep them in memory."""


class TaskKeys(TypedDict, total=False):
    """What to learn. Setting a key of another task is an error."""

    name: str
    """The task."""
    metric: str | None
    """The score that chooses the best checkpoint. Default: the main score of the task."""
    class_weights: Literal["none", "balanced"] | Mapping[str, float]
    """Weights of the labels in the loss. Labels missing from a table have weight 1."""
    calibrate: bool
    """Scale probabilities by a temperature that is tuned on the validation examples."""
    order: Sequence[str]
    """The labels from lowest to highest. Not needed if they are numbers."""
    prefix: str
    """What to put before each text. Default: ner:, classify: or nothing, by task."""
    max_target_length: int
    """Longest target or output, in tokens."""
    num_beams: int
    """1: greedy search. More: beam search, as in transformers' generate."""
    length_penalty: float
    """Beams are compared by log-probability / length ** this. Higher values favour longer texts."""
    constrained: bool
    """Let the decoder write only words of the text and known types, or only labels."""
    format: Literal["list", "tanl"]
    """How entities are written."""
    stride: int | None
    """How many tokens neighbouring windows share. Default: a quarter of max_length."""
    subwords: Literal["first", "all"]
    """Which sub-words of a word are trained. The first one predicts."""
    decoding: Literal["viterbi", "argmax"]
    """viterbi: the best valid IOB2 sequence. argmax: each word on its own."""
    crf: bool
    """Add a conditional random field over the tags of a sentence."""
    loss: str | None
    """What compares texts, listed in docs/how-to/search.md and, for rerankers, rerank.md. Default: by the data."""
    temperature: float
    """Cosines are divided by this in the loss."""
    symmetric: bool
    """Contrastive loss: also compare each second text with all first texts."""
    dims: Sequence[int]
    """Also train vectors cut to their first dimensions (Matryoshka), for example [128, 64]."""
    normalize: bool | None
    """Return vectors of length 1. Default: as in the base."""
    query_prompt: str | None
    """Put before each query, or before each text if there are no pairs. Default: the base's prompt."""
    document_prompt: str | None
    """Put before second texts and negatives. Default: the base's prompt."""


class LoraKeys(TypedDict, total=False):
    """The adapter. Keys have peft's names without the lora_ prefix."""

    r: int
    """The rank: rows of A and columns of B."""
    alpha: float
    """The update is scaled by alpha / r."""
    dropout: float
    """Dropout on the input of the update."""
    target_modules: Sequence[str] | str
    """Layers to adapt: names, a regular expression, `all-linear`, or a preset such as `query-value`."""
    exclude_modules: Sequence[str] | str
    """Layers to leave out: names, or a regular expression."""
    layers_to_transform: Sequence[int] | None
    """Adapt only these blocks, counted from 0. Default: all of them."""
    use_rslora: bool
    """Scale by alpha / sqrt(r)."""
    use_dora: bool
    """Use DoRA."""
    update: str
    """lora, dora (the same as use_dora), lora_fa, vera or adalora."""
    target_r: int | None
    """adalora: the average rank after pruning. Default: r / 2."""
    lora_bias: bool
    """Give B a bias."""
    bias: Literal["none", "lora_only", "all"]
    """Which biases of the base to train."""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]]
    """Rows of the input embedding to train, or of embeddings by name."""
    init: str
    """How A and B start: kaiming, gaussian, pissa, olora, orthogonal, ...; see LoraConfig."""
    rank_pattern: Mapping[str, int]
    """Other ranks for some layers, by name or regular expression."""
    alpha_pattern: Mapping[str, float]
    """Other alphas for some layers, by name or regular expression."""
    modules_to_save: Sequence[str]
    """Modules to train in full, besides the head and newly initialised layers."""


class TrainKeys(TypedDict, total=False):
    """How to train. A step is one optimizer update; `batch_size` is the number of examples in it, over all micro-batches."""

    method: Literal["lora", "full", "head"]
    """lora: train an adapter. full: train all weights. head: train only the output layer."""
    epochs: int | None
    """Passes over the training data. Default: by the number of examples."""
    max_steps: int | None
    """Stop after this many steps, even if `epochs` are not done."""
    batch_size: int | None
    """Examples in a step. Default: by the number of examples."""
    micro_batch_size: int | None
    """Examples in a forward pass. Default: the whole batch."""
    lr: float | None
    """Learning rate. Default: by the number of examples."""
    head_start: Literal["auto", "contrast", "probe", "random"]
    """How a new output layer starts. probe: fitted to the frozen base. contrast: fitted after the adapter learned from pairs."""
    head_lr: float | None
    """Learning rate of modules that are trained in full. Default: lr."""
    loraplus_lr_ratio: float
    """LoRA+: the learning rate of B, as a multiple of A's."""
    warmup: float
    """Below 1: a share of all steps. Otherwise: a number of steps."""
    schedule: Literal["linear", "cosine", "constant"]
    """How the learning rate falls after warm-up."""
    weight_decay: float
    """Weight decay of AdamW."""
    max_grad_norm: float
    """Clip gradients to this norm."""
    seed: int
    """Decides the split, the order of examples and all random numbers."""
    seeds: Sequence[int]
    """Instead of seed: one run for each, with mean and spread of the scores."""
    eval_every: int | None
    """Steps between evaluations. Default: every epoch, or 4 to 8 times if epochs is not set."""
    checkpoint_every: int | None
    """Steps between checkpoints. Default: at each evaluation."""
    patience: int | None
    """Stop after this many evaluations without a new best."""
    non_finite: Literal["stop", "skip"]
    """What to do if a loss or gradient is not finite: stop, or skip the step."""
    shard_base: bool
    """With several processes: split the frozen layers between them (FSDP)."""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"]
    """Where to train. auto: the accelerator that torch finds, or else the CPU."""
    deterministic: bool
    """On a GPU: give the same bits every time, with slower algorithms. CPUs always do."""


class OutputKeys(TypedDict, total=False):
    """Where the run folder goes, and which trackers log the run."""

    dir: str | None
    """The run folder. Default: runs/, and the name of the recipe or data file."""
    trackers: Sequence[Literal["tensorboard", "wandb", "mlflow", "trackio"]]
    """Where to log the run."""
    project: str | None
    """The trackers' project. Default: from their environment variables, or lorakit."""


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
