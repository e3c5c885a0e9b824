"""What is known of each task before its data and its model are: what recipes, readers, server, exports and reports ask.

It imports no torch. The task itself is a class elsewhere (`Task` in tasks/base.py), imported when one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.data.example import Wants

# What an answer may say besides the texts it is about; files of answers, the server and the report know these keys.
ANSWER_COLUMNS = ("label", "score", "labels", "value", "entities", "generated", "probabilities", "embedding")
Names = Callable[[tuple[str, ...]], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """The facts of one task."""

    name: str  # in the recipe
    made_by: (
        str  # module:name of what takes a TaskSection, tokenizer, labels and length limit in tokens, and gives a Task
    )
    model_kind: str  # a key of models.KINDS
    wants: Wants  # of each record
    takes_shares: bool = False  # where it wants a label: also soft ones, a share for each label
    metrics: tuple[str, ...]  # what task.metric may be; the first one chooses where the recipe does not say
    two_label_metrics: tuple[str, ...] = ()  # those of them that there are with two labels alone
    answer_columns: tuple[str, ...]  # keys of its answers, of ANSWER_COLUMNS
    word: str = ""  # for it on the command line
    keys: tuple[str, ...] = ()  # of the recipe's [task] table, that are its own or shared with some other tasks
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of keys, where they are not the table's
    labels: Names = tuple  # from the labels in the data, in order
    outputs: Names = tuple  # names of the head's outputs, from the labels
    outputs_are: str = ""  # what they mean, where that is not a logit of each label
    layers: str = (
        ""  # module:name of what gives modules to train besides the head, by name, from a TaskSection and labels
    )
    reads_windows: bool = False  # whether it reads all of a text that is longer than the limit
    contrasts: bool = (
        False  # whether its loss compares the texts of a batch: its examples are whole, its batches undivided
    )
    losses: tuple[str, ...] = ()  # what task.loss may be
    complete: str = ""  # module:name of what gives unset keys their values, from a TaskSection, a Layout and examples

    def __post_init__(self) -> None:
        if unknown := sorted({*self.answer_columns} - {*ANSWER_COLUMNS}):
            raise ConfigError(f"task {self.name!r}: answer_columns: {unknown[0]!r} is not one of {ANSWER_COLUMNS}")

    @property
    def has_head(self) -> bool:
        """Whether its answers come from an output layer of its own."""
        return self.model_kind not in ("text2text", "embedding")

    @property
    def names_labels(self) -> bool:
        """Whether its answers are labels, which its training data name."""
        return self.wants in ("label", "labels", "words")

    @property
    def compares(self) -> bool:
        """Whether it says of several texts which goes best with another one."""
        return self.wants in ("related", "choices")

    def texts_read(self, items: Iterable[Sequence[Any]]) -> int:
        """How many texts examples are read as, from the items of each; windows are of one text."""
        return sum(1 if self.reads_windows else len(own) for own in items)

    def metrics_of(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The scores that can choose the best checkpoint with these labels."""
        return tuple(name for name in self.metrics if name not in self.two_label_metrics or len(labels) == 2)


def tag_names(types: tuple[str, ...]) -> tuple[str, ...]:
    """The tags of a set of entity types: O, then B- and I- of each."""
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def steps(labels: tuple[str, ...]) -> tuple[str, ...]:
    """The outputs of an ordinal head: output k is the logit of a label beyond the k-th, given at least the k-th."""
    return tuple(f"beyond {label}" for label in labels[:-1])


TASKS: dict[str, TaskInfo] = {
    info.name: info
    for info in (
        TaskInfo(
            name="sequence_classification",
            made_by="lorakit.tasks.sequence:SequenceClassification.make",
            model_kind="sequence_classification",
            wants="label",
            takes_shares=True,
            metrics=("accuracy", "macro_f1", "mcc", "f1", "nll", "brier", "ece"),
            two_label_metrics=("f1",),
            answer_columns=("label", "score", "probabilities"),
            word="classification",
            keys=("class_weights", "calibrate"),
        ),
        TaskInfo(
            name="multi_label_classification",
            made_by="lorakit.tasks.sequence:MultiLabelClassification.make",
            model_kind="multi_label_classification",
            wants="labels",
            metrics=("macro_average_precision", "micro_f1_at_0.5", "macro_f1_at_0.5", "subset_accuracy_at_0.5"),
            answer_columns=("labels", "probabilities"),
            word="multi-label",
        ),
        TaskInfo(
            name="ordinal_classification",
            made_by="lorakit.tasks.sequence:OrdinalClassification.make",
            model_kind="multi_label_classification",  # in transformers' words: each output is a logit of its own
            wants="label",
            metrics=("quadratic_kappa", "accuracy", "mae", "macro_f1", "mcc", "nll", "brier"),
            answer_columns=("label", "score", "probabilities"),
            word="ordinal",
            keys=("order",),
            outputs=steps,
            outputs_are="logits of a label beyond the k-th, given at least the k-th (CORN)",
        ),
        TaskInfo(
            name="sequence_regression",
            made_by="lorakit.tasks.sequence:SequenceRegression.make",
            model_kind="regression",
            wants="number",
            metrics=("pearson", "spearman", "mae", "rmse"),
            answer_columns=("value",),
            word="regression",
            outputs=lambda labels: ("value",),
        ),
        TaskInfo(
            name="token_classification",
            made_by="lorakit.tasks.token_classification:TokenClassification.make",
            model_kind="token_classification",
            wants="words",
            metrics=("entity_f1", "entity_f1_strict"),
            answer_columns=("entities",),
            word="ner",
            keys=("stride", "subwords", "decoding", "crf"),
            labels=tag_names,
            layers="lorakit.tasks.token_classification:layers",
            reads_windows=True,
        ),
        TaskInfo(
            name="text2text_ner",
            made_by="lorakit.tasks.text2text.ner:Text2TextNer.make",
            model_kind="text2text",
            wants="words",
            metrics=("entity_f1", "entity_f1_strict"),
            answer_columns=("entities", "generated"),
            word="text2text",
            keys=("prefix", "max_target_length", "constrained", "format"),
        ),
        TaskInfo(
            name="text2text_classification",
            made_by="lorakit.tasks.text2text.classification:Text2TextClassification.make",
            model_kind="text2text",
            wants="label",
            metrics=("accuracy", "macro_f1", "mcc", "f1"),
            two_label_metrics=("f1",),
            answer_columns=("label", "score", "generated", "probabilities"),
            keys=("prefix", "constrained"),
            defaults={"prefix": "classify: ", "constrained": True},
        ),
        TaskInfo(
            name="text2text_generation",
            made_by="lorakit.tasks.text2text.writing:Text2Text.make",
            model_kind="text2text",
            wants="target",
            metrics=("chrf", "rouge_l", "rouge_1", "rouge_2", "exact_match"),
            answer_columns=("generated", "score"),
            word="generation",
            keys=("prefix", "max_target_length", "num_beams", "length_penalty"),
            defaults={"prefix": ""},
        ),
        TaskInfo(
            name="multiple_choice",
            made_by="lorakit.tasks.multiple_choice:MultipleChoice.make",
            model_kind="multiple_choice",
            wants="choices",
            metrics=("accuracy", "nll"),
            answer_columns=("label", "score", "probabilities"),
            word="choice",
            outputs=lambda labels: ("score",),
            outputs_are="a score of one choice: softmax over those of a question gives probabilities",
            contrasts=True,
        ),
        TaskInfo(
            name="embedding",
            made_by="lorakit.tasks.embedding:Embedding.make",
            model_kind="embedding",
            wants="related",
            metrics=("ndcg_at_10", "mrr_at_10", "recall_at_10", "map", "spearman", "pearson"),
            answer_columns=("embedding", "score"),
            word="embedding",
            keys=("loss", "temperature", "symmetric", "dims", "normalize", "query_prompt", "document_prompt"),
            contrasts=True,
            losses=("contrastive", "cosent", "angle", "cosine_mse", "triplet", "margin_mse", "kl"),
            complete="lorakit.tasks.embedding:complete",
        ),
        TaskInfo(
            name="reranker",
            made_by="lorakit.tasks.reranker:Reranker.make",
            model_kind="reranker",
            wants="related",
            metrics=("ndcg_at_10", "mrr_at_10", "recall_at_10", "map", "spearman", "pearson"),
            answer_columns=("score",),
            word="rerank",
            keys=("loss",),
            outputs=lambda labels: ("score",),
            contrasts=True,
            losses=("bce", "pairwise", "listnet", "lambda", "margin_mse"),
            complete="lorakit.tasks.reranker:complete",
        ),
    )
}


def register_task(info: TaskInfo) -> None:
    """Let a task from outside of this package be one of those that recipes name.

    CONTRIBUTING.md shows a whole task: its facts, as here, and its class.

    >>> from lorakit.task_info import TaskInfo
    >>> lorakit.register_task(
    ...     TaskInfo(
    ...         name="median_regression",
    ...         made_by="my_package.median:MedianRegression.make",
    ...         model_kind="regression",
    ...         wants="number",
    ...         metrics=("mae",),
    ...         answer_columns=("value",),
    ...         outputs=lambda labels: ("value",),
    ...     )
    ... )

    Raises:
        ConfigError: another one has its name.
    """
    if TASKS.get(info.name, info) != info:
        raise ConfigError(f"task {info.name!r} is registered already, made by {TASKS[info.name].made_by}")
    TASKS[info.name] = info
