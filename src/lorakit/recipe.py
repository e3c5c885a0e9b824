"""Every setting of a run, read from a TOML file and key=value arguments. All defaults are here, and are written to the run's
recipe.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorakit.errors import ConfigError, did_you_mean, short
from lorakit.hashing import open_regular, parse_toml
from lorakit.lora.config import ALL_LINEAR, LoraConfig
from lorakit.lora.safe_regex import Pattern
from lorakit.lora.target_presets import PRESET_NAMES
from lorakit.task_info import TASKS, TaskInfo

Names = Annotated[tuple[str, ...], Field(strict=False)]
Indices = Annotated[tuple[int, ...], Field(strict=False)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
RECIPES = Path(__file__).parent / "recipes"  # those that ship with the package, each used by its name
HeadStart = Literal["auto", "contrast", "probe", "random"]
Folds = Literal["auto", 0] | Annotated[int, Field(ge=2)]
UNSET = "# not set: "  # begins a comment that marks a recipe as written by lorakit
MOST_BYTES = 2**24  # of a recipe file
MOST_NESTED = 8
# of keys of [lora], in LoraConfig
PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout", "init": "init_lora_weights"}
LOFTQ = "loftq"  # a value of lora.init: the adapter is initialised after it was added, from the quantised base
Pooling = Literal["auto", "cls", "mean"]
FORMATS = [  # of data; data/formats.py has their readers
    "auto",
    "csv",
    "tsv",
    "jsonl",
    "json",
    "parquet",
    "arrow",
    "conll",
    "label-first",
    "label-studio",
    "doccano",
    "prodigy",
    "brat",
    "spacy",
    "excel",
    "folders",
    "datasets",
]


def _one_of(known: Collection[str]) -> BeforeValidator:
    """A check like that of a Literal, for a set of names that can grow."""

    def check(name: Any) -> Any:
        if not isinstance(name, str) or name not in known:
            *others, last = map(repr, known)
            expected = f"{', '.join(others)} or {last}"
            raise PydanticCustomError("unknown_name", "Input should be {expected}", {"expected": expected})
        return name

    return BeforeValidator(check)


DataFormat = Annotated[str, _one_of(FORMATS), WithJsonSchema({"enum": FORMATS})]
TaskName = Annotated[str, _one_of(TASKS), WithJsonSchema({"enum": list(TASKS)})]
Name = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]  # 3 means "3"
DELIMITER_NAMES = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|", "\\t": "\t"}
Delimiter = Annotated[  # in key=value arguments a comma separates list items
    str,
    BeforeValidator(lambda value: "," if value == [] else DELIMITER_NAMES.get(str(value), value)),
    Field(min_length=1, max_length=1),
]
ColumnNumbers = dict[Literal["word", "tag"], Annotated[int, Field(ge=1)]]
Dims = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)]
LabelNames = Annotated[tuple[Name, ...], Field(strict=False)]
ClassWeights = Annotated[  # a discriminated union, so that an error is about the form that was used
    Annotated[Literal["none", "balanced"], Tag("word")]
    | Annotated[dict[str, Annotated[float, Field(gt=0)]], Tag("table")],
    Discriminator(lambda value: "table" if isinstance(value, dict) else "word"),
]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(strict=False),
]


class Section(BaseModel):
    """A table of the recipe: unknown keys, NaN and values of the wrong type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The frozen base model."""

    # A hub id, a folder, `minilm` or `t5-demo`.
    base: str
    # A branch, tag or commit of a hub id.
    revision: str | None = None
    # Start from this run or adapter on the same base. [lora] is then taken from it.
    adapter: str | None = None
    # Whether to keep the output layer of `adapter`. auto: keep it if the labels are the same.
    adapter_head: Literal["auto", "keep", "new"] = "auto"
    # How the frozen base is stored. auto: the fastest on this machine, or fp16 if the GPU only emulates bf16.
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Dropout of the base model. Default: from its config, or none below 500 examples.
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    # How the frozen linear layers are stored.
    quantize: Literal["none", "int8", "nf4"] = "none"
    # auto: use faster modules where they fit. plain: run every module unchanged, as in transformers.
    kernels: Literal["auto", "plain"] = "auto"
    # What a classifier reads. cls: what its model family does; mean: the mean over tokens; auto: what the checkpoint says.
    pooling: Pooling = "auto"


class DataSection(Section):
    """Where the examples come from: a file, a pattern or URL of files, a folder saved by `datasets`, or a data set of the hub.

    A data set of the hub is ID[:CONFIG][@REVISION][#SPLIT]; URLs are those that fsspec reads.
    """

    # The training data.
    train: str | None = None
    # The validation data. Default: a share of the training data.
    validation: str | None = None
    # Data to score once, at the end.
    test: str | None = None
    # The format of the files. auto: guessed from name and content.
    format: DataFormat = "auto"
    # Column of the text. Default: a common name, which a note prints.
    text: Name | None = None
    # Column of the second text, for pairs.
    pair: Name | None = None
    # Column of the label. For several columns: a 0 or 1, or a share, for each label.
    label: Name | Names | None = None
    # Columns of texts that do not belong to the first text, for embeddings.
    negative: Name | Names | None = None
    # Columns of the answers to choose from: one column of lists, or one column for each. Default: common names.
    choices: Name | Names | None = None
    # How the label names the right choice: by letter or name, by text, or by number. Default: guessed, which a note prints.
    answers: Literal["name", "text", "from_0", "from_1"] | None = None
    # Separates several labels in one cell.
    label_separator: Annotated[str, Field(min_length=1)] = ","
    # What to do if character spans overlap: stop, or keep the longest.
    overlaps: Literal["error", "longest"] = "error"
    # Separator of a table, or its name (tab). Default: guessed, which a note prints.
    delimiter: Delimiter | None = None
    # false: the table has no header, and its columns are called 1, 2, ...
    header: bool | None = None
    # Encoding of text files. Default: UTF-8.
    encoding: str | None = None
    # Columns of CoNLL files, counted from 1: {word = 2, tag = 3}. Default: guessed.
    columns: ColumnNumbers | None = None
    # What to do with bad records: stop and list them, or skip them.
    on_bad: Literal["stop", "skip"] = "stop"
    # Column (a document, a user) whose rows must stay on the same side of the split.
    group: str | None = None
    # Folds for cross-validation, or 0 for none. auto: 2 or 3 below 500 examples without validation data.
    folds: Folds = "auto"
    # Share to hold out. Stratified by label; identical texts stay together.
    validation_share: Share = 0.1
    # Also train on each label's name, as a text. Default: up to 20 texts per label, if names are words.
    label_names: bool | None = None
    # Longest text in tokens. Default: the model's limit, at most 512.
    max_length: Annotated[int, Field(ge=8)] | None = None
    # Folder for encoded examples and downloaded files, shared by runs. Default: keep them in memory.
    cache: str | None = None


class TaskSection(Section):
    """What to learn. Setting a key of another task is an error."""

    # The task.
    name: TaskName = "sequence_classification"
    # The score that chooses the best checkpoint. Default: the main score of the task.
    metric: str | None = None
    # Weights of the labels in the loss. Labels missing from a table have weight 1.
    class_weights: ClassWeights = "none"
    # Scale probabilities by a temperature that is tuned on the validation examples.
    calibrate: bool = False
    # The labels from lowest to highest. Not needed if they are numbers.
    order: LabelNames = ()
    # What to put before each text. Default: ner:, classify: or nothing, by task.
    prefix: str = "ner: "
    # Longest target or output, in tokens.
    max_target_length: Annotated[int, Field(ge=8)] = 128
    # 1: greedy search. More: beam search, as in transformers' generate.
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    # Beams are compared by log-probability / length ** this. Higher values favour longer texts.
    length_penalty: float = 1.0
    # Let the decoder write only words of the text and known types, or only labels.
    constrained: bool = False
    # How entities are written.
    format: Literal["list", "tanl"] = "list"
    # How many tokens neighbouring windows share. Default: a quarter of max_length.
    stride: Annotated[int, Field(ge=0)] | None = None
    # Which sub-words of a word are trained. The first one predicts.
    subwords: Literal["first", "all"] = "first"
    # viterbi: the best valid IOB2 sequence. argmax: each word on its own.
    decoding: Literal["viterbi", "argmax"] = "viterbi"
    # Add a conditional random field over the tags of a sentence.
    crf: bool = False
    # What compares texts, listed in docs/how-to/search.md and, for rerankers, rerank.md. Default: by the data.
    loss: str | None = None
    # Cosines are divided by this in the loss.
    temperature: Annotated[float, Field(gt=0)] = 0.05
    # Contrastive loss: also compare each second text with all first texts.
    symmetric: bool = False
    # Also train vectors cut to their first dimensions (Matryoshka), for example [128, 64].
    dims: Dims = ()
    # Return vectors of length 1. Default: as in the base.
    normalize: bool | None = None
    # Put before each query, or before each text if there are no pairs. Default: the base's prompt.
    query_prompt: str | None = None
    # Put before second texts and negatives. Default: the base's prompt.
    document_prompt: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, raw: Any) -> Any:
        known = TASKS.get(str(raw.get("name"))) if isinstance(raw, Mapping) else None
        return raw if known is None else {**known.defaults, **raw}

    @model_validator(mode="after")
    def _keys_of_the_task(self) -> Self:
        for key, tasks in task_keys().items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and self.name not in tasks:
                raise ValueError(f"task.{key} = {value!r} belongs to {' and '.join(tasks)}, not to {self.name}")
        if self.crf and (self.decoding, self.subwords) != ("viterbi", "first"):
            raise ValueError("task.crf = true scores whole words: it needs decoding = 'viterbi' and subwords = 'first'")
        if self.metric is not None and self.metric not in self.info.metrics:
            hint = did_you_mean(self.metric, self.info.metrics)
            raise ValueError(f"task.metric = {self.metric!r} is not a score of {self.name}; {hint}")
        if self.loss is not None and self.loss not in self.info.losses:
            raise ValueError(f"task.loss = {self.loss!r}: {did_you_mean(self.loss, self.info.losses)}")
        if self.order and (len(self.order) < 2 or len(set(self.order)) < len(self.order)):
            raise ValueError(f"task.order = {list(self.order)}: needs at least two labels, each once")
        return self

    @property
    def info(self) -> TaskInfo:
        """What is known of the task."""
        return TASKS[self.name]

    @property
    def selection_metric(self) -> str:
        """The score that chooses the best checkpoint."""
        return self.metric or self.info.metrics[0]


def task_keys() -> dict[str, list[str]]:
    """The keys of the [task] table that only some tasks have, and those tasks."""
    keys = [key for key in TaskSection.model_fields if key not in ("name", "metric")]
    return {key: [info.name for info in TASKS.values() if key in info.keys] for key in keys}


def _listed(names: Sequence[str] | str) -> tuple[str, ...] | str:
    """A string that is a plain dotted name is one name; any other string but a preset is a regex."""
    if isinstance(names, str):
        keep = names in (ALL_LINEAR, *PRESET_NAMES) or not re.fullmatch(r"[\w.]+", names)
        return names if keep else (names,)
    return tuple(names)


class LoraSection(Section):
    """The adapter. Keys have peft's names without the lora_ prefix."""

    # The rank: rows of A and columns of B.
    r: Annotated[int, Field(ge=1)] = 8
    # The update is scaled by alpha / r.
    alpha: Annotated[float, Field(gt=0)] = 16
    # Dropout on the input of the update.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Layers to adapt: names, a regular expression, `all-linear`, or a preset such as `query-value`.
    target_modules: Names | str = ALL_LINEAR
    # Layers to leave out: names, or a regular expression.
    exclude_modules: Names | str = ()
    # Adapt only these blocks, counted from 0. Default: all of them.
    layers_to_transform: Indices | None = None
    # Scale by alpha / sqrt(r).
    use_rslora: bool = False
    # Use DoRA.
    use_dora: bool = False
    # lora, dora (the same as use_dora), lora_fa, vera or adalora.
    update: str = "lora"
    # adalora: the average rank after pruning. Default: r / 2.
    target_r: Annotated[int, Field(ge=1)] | None = None
    # Give B a bias.
    lora_bias: bool = False
    # Which biases of the base to train.
    bias: Literal["none", "lora_only", "all"] = "none"
    # Rows of the input embedding to train, or of embeddings by name.
    trainable_token_indices: Indices | dict[str, Indices] = ()
    # How A and B start: kaiming, gaussian, pissa, olora, orthogonal, ...; see LoraConfig.
    init: str = "kaiming"
    # Other ranks for some layers, by name or regular expression.
    rank_pattern: dict[str, int] = {}
    # Other alphas for some layers, by name or regular expression.
    alpha_pattern: dict[str, float] = {}
    # Modules to train in full, besides the head and newly initialised layers.
    modules_to_save: Names = ()

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if self.target_r is not None and self.update != "adalora":
            raise ValueError(f"lora.target_r = {self.target_r} belongs to update = 'adalora', not to {self.update!r}")
        try:
            config = self.config(modules_to_save=("the head",))
        except ConfigError as err:
            message = str(err)
            for key, name in PEFT_NAMES.items():
                message = message.replace(name, key)
            raise ValueError(f"lora.{message}") from err
        for key in ("target_modules", "exclude_modules"):
            pattern = getattr(config, key)
            if isinstance(pattern, str) and pattern not in (ALL_LINEAR, *PRESET_NAMES):
                try:
                    Pattern(pattern)
                except re.error as err:
                    raise ValueError(f"lora.{key} = {pattern[:80]!r} is not a regular expression: {err}") from err
        return self

    def config(self, modules_to_save: Sequence[str] = ()) -> LoraConfig:
        """The adapter's settings, with these modules saved in addition to the named ones."""
        settings = {PEFT_NAMES.get(key, key): value for key, value in self if key != "target_r"}
        return LoraConfig(
            **settings
            | {
                "target_modules": _listed(self.target_modules),
                "exclude_modules": _listed(self.exclude_modules),
                "modules_to_save": tuple(dict.fromkeys((*self.modules_to_save, *modules_to_save))),
                "init_lora_weights": "kaiming" if self.init == LOFTQ else self.init,
            }
        )


class TrainSection(Section):
    """How to train. A step is one optimizer update; `batch_size` is the number of examples in it, over all micro-batches."""

    # lora: train an adapter. full: train all weights. head: train only the output layer.
    method: Literal["lora", "full", "head"] = "lora"
    # Passes over the training data. Default: by the number of examples.
    epochs: Annotated[int, Field(ge=1)] | None = None
    # Stop after this many steps, even if `epochs` are not done.
    max_steps: Annotated[int, Field(ge=1)] | None = None
    # Examples in a step. Default: by the number of examples.
    batch_size: Annotated[int, Field(ge=1)] | None = None
    # Examples in a forward pass. Default: the whole batch.
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    # Learning rate. Default: by the number of examples.
    lr: Annotated[float, Field(gt=0)] | None = None
    # How a new output layer starts. probe: fitted to the frozen base. contrast: fitted after the adapter learned from pairs.
    head_start: HeadStart = "auto"
    # Learning rate of modules that are trained in full. Default: lr.
    head_lr: Annotated[float, Field(gt=0)] | None = None
    # LoRA+: the learning rate of B, as a multiple of A's.
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    # Below 1: a share of all steps. Otherwise: a number of steps.
    warmup: Annotated[float, Field(ge=0)] = 0.06
    # How the learning rate falls after warm-up.
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    # Weight decay of AdamW.
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    # Clip gradients to this norm.
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    # Decides the split, the order of examples and all random numbers.
    seed: Annotated[int, Field(ge=0)] = 0
    # Instead of seed: one run for each, with mean and spread of the scores.
    seeds: Seeds = ()
    # Steps between evaluations. Default: every epoch, or 4 to 8 times if epochs is not set.
    eval_every: Annotated[int, Field(ge=1)] | None = None
    # Steps between checkpoints. Default: at each evaluation.
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    # Stop after this many evaluations without a new best.
    patience: Annotated[int, Field(ge=1)] | None = None
    # What to do if a loss or gradient is not finite: stop, or skip the step.
    non_finite: Literal["stop", "skip"] = "stop"
    # With several processes: split the frozen layers between them (FSDP).
    shard_base: bool = False
    # Where to train. auto: the accelerator that torch finds, or else the CPU.
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    # On a GPU: give the same bits every time, with slower algorithms. CPUs always do.
    deterministic: bool = False

    @model_validator(mode="after")
    def _seed_or_seeds(self) -> Self:
        if self.seeds and self.seed:
            raise ValueError(f"train.seed = {self.seed} and train.seeds = {list(self.seeds)}: set one of them")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"train.seeds = {list(self.seeds)}: the same seed twice would give the same run")
        return self


class ChosenTrain(TrainSection):
    """The same without unset keys, which `training/budget.py` chooses by the number of examples."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]


class OutputSection(Section):
    """Where the run folder goes, and which trackers log the run."""

    # The run folder. Default: runs/, and the name of the recipe or data file.
    dir: str | None = None
    # Where to log the run.
    trackers: Trackers = ()
    # The trackers' project. Default: from their environment variables, or lorakit.
    project: str | None = None


class Recipe(Section):
    """All sections; only `model.base` and `data.train` have no default."""

    model: ModelSection
    data: DataSection = DataSection()
    task: TaskSection = TaskSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _sections_go_together(self) -> Self:
        method, quantize = self.train.method, self.model.quantize
        if self.model.adapter is None and self.model.adapter_head != "auto":
            raise ValueError(f"model.adapter_head = {self.model.adapter_head!r} needs model.adapter")
        if self.model.adapter is not None and method != "lora":
            raise ValueError(f"train.method = {method!r}: a run with model.adapter continues with LoRA")
        if method == "full":
            if self.model.dtype in ("bf16", "fp16"):
                raise ValueError(
                    f"model.dtype = {self.model.dtype!r}: train.method = 'full' trains the weights themselves and needs fp32"
                )
            if quantize != "none":
                raise ValueError(f"model.quantize = {quantize!r}: train.method = 'full' trains the weights themselves")
            if self.task.crf:
                raise ValueError("task.crf = true: train.method = 'full' writes a plain model, which cannot hold a CRF")
        if self.data.folds not in ("auto", 0):
            against = {
                "data.validation is set": self.data.validation is not None,
                "data.cache holds examples outside of memory": self.data.cache is not None,
                "train.method = 'full' trains the weights that the folds would share": method == "full",
                "train.shard_base = true": self.train.shard_base,
            }
            if why := next((why for why, holds in against.items() if holds), None):
                raise ValueError(f"data.folds = {self.data.folds}: not possible, because {why}")
        for key in ("choices", "answers"):
            if getattr(self.data, key) is not None and self.task.info.wants != "choices":
                raise ValueError(
                    f"data.{key} = {getattr(self.data, key)!r} is for multiple choice, not {self.task.name}"
                )
        if self.data.label_names and self.task.info.wants not in ("label", "labels"):
            raise ValueError(f"data.label_names = true: texts do not have labels in task.name = {self.task.name!r}")
        if self.train.head_start == "contrast" and (method != "lora" or self.task.name != "sequence_classification"):
            raise ValueError(
                "train.head_start = 'contrast' trains an adapter on pairs of texts with one label: it needs "
                "train.method = 'lora' and task.name = 'sequence_classification'"
            )
        against = {
            f"data.folds = {self.data.folds}: the answers of several models": self.data.folds not in ("auto", 0)
            and self.task.info.wants == "related",
            "train.shard_base = true: the shares of a batch": self.train.shard_base and self.task.info.contrasts,
        }
        if why := next((why for why, holds in against.items() if holds), None):
            raise ValueError(f"{why} cannot be compared with each other, which task.name = {self.task.name!r} needs")
        if self.model.pooling == "mean" and self.task.info.model_kind in ("token_classification", "text2text"):
            raise ValueError(f"model.pooling = 'mean' is for tasks that answer whole texts, not for {self.task.name}")
        if self.train.shard_base and (method == "full" or quantize != "none"):
            raise ValueError(
                "train.shard_base = true needs a frozen, unquantised base: no quantize, no method = 'full'"
            )
        if method == "lora" and not self.lora.target_modules:
            raise ValueError("lora.target_modules is empty; to train the head alone set train.method = 'head'")
        if self.lora.init == LOFTQ and quantize == "none":
            raise ValueError("lora.init = 'loftq' needs a quantised base: set model.quantize = 'nf4'")
        return self

    def check_processes(self, n: int) -> None:
        """Refuse what cannot be trained in so many processes."""
        if n > 1 and self.task.info.contrasts:
            raise ConfigError(
                f"task.name = {self.task.name!r} compares the texts of a whole batch, so it trains in one process, "
                f"not in {n}; use train.micro_batch_size for a large batch"
            )

    def with_keys(self, **sections: Mapping[str, Any]) -> Recipe:
        """The recipe with these values of these sections' keys, which are not checked."""
        copies = {name: getattr(self, name).model_copy(update=dict(values)) for name, values in sections.items()}
        return self.model_copy(update=copies)

    def flat(self) -> dict[str, Any]:
        """Every key as section.key, with its value as JSON has it."""
        sections = self.model_dump(mode="json")
        return {f"{section}.{key}": value for section, table in sections.items() for key, value in table.items()}

    def to_toml(self) -> str:
        """The resolved recipe with every key; keys without a value are listed in comments."""
        parts = []
        for name, section in self.model_dump(mode="json").items():
            unset = [key for key, value in section.items() if value is None]
            table = tomli_w.dumps({name: {key: value for key, value in section.items() if value is not None}})
            parts.append(table + (f"{UNSET}{', '.join(unset)}\n" if unset else ""))
        return "\n".join(parts)


def recipe_names() -> list[str]:
    """The names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_file(what: str) -> Path | None:
    """The recipe that a word names: a path that ends in .toml, or one that ships, by its name; None for anything else."""
    if what.endswith(".toml"):
        return Path(what)
    return RECIPES / f"{what}.toml" if what in recipe_names() and not Path(what).exists() else None


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, changed by `key=value` arguments.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, or a value has the wrong type or range.
    """
    try:
        with open_regular(path, MOST_BYTES) as file:
            raw = parse_toml(file.read().decode())
    except FileNotFoundError as err:
        beside = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, [*beside, *recipe_names()])
        raise ConfigError(f"recipe {path} does not exist; {hint}") from err
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not valid UTF-8 at byte {err.start:,}") from err
    except ValueError as err:
        hint = "" if path.suffix == ".toml" else "; expected a recipe, such as the recipe.toml of a run"
        raise ConfigError(f"{path}: not TOML: {err}{hint}") from err
    return make_recipe(raw, overrides, where=str(path))


def make_recipe(raw: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from nested mappings, changed by `key=value` arguments; errors name `where` or the argument they are in."""
    merged = {name: dict(table) if isinstance(table, Mapping) else table for name, table in raw.items()}
    words: dict[str, str] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"\w+\.\w+", key):
            form = f"section.key=value, for example {full_key(key) or 'train.lr'}={text or '1e-3'}"
            raise ConfigError(f"{short(word)}: write changes as {form}")
        try:
            value = toml_value(text)
        except ValueError as err:
            raise ConfigError(f"{key}: {err}") from err
        section, _, name = key.partition(".")
        if section not in merged:
            merged[section], words[section] = {}, word
        if not isinstance(merged[section], dict):
            raise ConfigError(f"{where}: {section} is not a table")
        merged[section][name] = value
        words[key] = word
    for section, table in merged.items():
        for name, value in table.items() if isinstance(table, dict) else ():
            key = f"{section}.{name}"
            _check_size(value, f"{words.get(key, where)[:200]}: {key[:80]}")
    try:
        return Recipe.model_validate(merged)
    except ValidationError as err:
        raise ConfigError(_problem_of(err, where, words)) from err


def _check_size(value: Any, place: str, depth: int = 0) -> None:
    """Raise a ConfigError for values that are nested too deep or numbers that are too large for any key."""
    if depth > MOST_NESTED:
        raise ConfigError(f"{place}: nested too deep")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{place}: a whole number too large for 64 bits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _check_size(inner, place, depth + 1)


def toml_value(text: str) -> Any:
    """The value as TOML reads it; bare words are strings, and with commas or in brackets lists of strings."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        inner = text[1:-1] if re.fullmatch(r"\[[^\[\]]*\]", text) else text
        if ("," in text or inner != text) and not re.search(r"[()|\\]", inner):
            return [toml_value(part.strip()) for part in inner.split(",") if part.strip()]
        return text


def known_keys() -> list[str]:
    """Every key of a recipe, as section.key."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]  # type: ignore[union-attr]


ELSEWHERE = {  # what peft, the Trainer and scikit-learn call some keys
    "learning_rate": "train.lr",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "random_state": "train.seed",
    "output_dir": "output.dir",
    "model_name": "model.base",
    "max_seq_length": "data.max_length",
    "test_size": "data.validation_share",
    "class_weight": "task.class_weights",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
}


def full_key(name: str) -> str | None:
    """The key of this name with its section, None if there is none: epochs and num_epochs are train.epochs."""
    name = name.replace("-", "_")
    return next((key for key in known_keys() if key.partition(".")[2] == name), ELSEWHERE.get(name))


# pydantic's kinds of errors, in terms of JSON
EXPECTED = {
    "string_type": "text",
    "string_unicode": "valid Unicode text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "an object"),
}


def first_problem(err: ValidationError) -> str:
    """The first error, as `key = value: should be ...`."""
    problem = err.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part)[:80] for part in problem["loc"][:2])
    if problem["type"] == "missing":
        return f"{key} is missing"
    place = f"{key} = {short(problem['input'])}" if key else short(problem["input"])
    words = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in EXPECTED:
        words = f"should be {EXPECTED[problem['type']]}"
    return f"{place}: {words.replace('Input should', 'should').replace('String should', 'should')}"


def _problem_of(err: ValidationError, where: str, words: Mapping[str, str]) -> str:
    """The same of a recipe: where the key was set, and for an unknown one the nearest that there is."""
    problem = err.errors()[0]
    path = [str(part)[:80] for part in problem["loc"][:2]]
    key, place = ".".join(path), words.get(".".join(path), where)[:200]
    if problem["type"] == "extra_forbidden":
        meant = full_key(path[1]) if len(path) > 1 else None
        known = known_keys() if len(path) > 1 else list(Recipe.model_fields)
        return f"{place}: unknown key {key!r}; {f'did you mean {meant!r}?' if meant else did_you_mean(key, known)}"
    if problem["type"] == "value_error":  # of a whole table; the message names its keys itself
        text = problem["msg"].removeprefix("Value error, ")
        place = next((word for key, word in words.items() if "." in key and key in text), place)
    else:
        text = first_problem(err)
        for ending, of_toml in (("be an object", "be a table"), ("be a list", "be a list, for example [a,b]")):
            text = text.removesuffix(ending) + of_toml * text.endswith(ending)
    has_place = text.startswith(f"{place.partition('=')[0]} = ")  # a word says key and value as well
    return text if has_place else f"{place}: {text}"
