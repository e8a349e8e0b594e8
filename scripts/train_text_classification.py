"""Fine-tune a text classifier, and make it smaller on the way.

    python scripts/train_text_classification.py --model_name_or_path distilbert-base-uncased --dataset_name imdb \
        --output_dir out --num_train_epochs 3 --learning_rate 5e-5 --ratio 0.5
    python scripts/train_text_classification.py --model_name_or_path MODEL --train_file train.csv \
        --validation_file test.csv --output_dir out --recipe my_recipe.yaml

Takes every argument of transformers' TrainingArguments. The folder it writes loads with `import hf_shrink` and
`from_pretrained`; with --portable, or `portable: true` in the recipe, also without hf_shrink.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_shrink import ShrinkCallback
from hf_shrink.evaluation import metric_path


@dataclass
class DataArguments:
    """What is learnt from what."""

    model_name_or_path: str = field(metadata={"help": "a folder, or an id on the Hub"})
    dataset_name: str | None = field(default=None, metadata={"help": "a data set on the Hub"})
    train_file: str | None = field(default=None, metadata={"help": "a .csv or .json file, in place of dataset_name"})
    validation_file: str | None = field(default=None, metadata={"help": "a .csv or .json file"})
    validation_split: str = field(default="test", metadata={"help": "the split of dataset_name to measure on"})
    text_column: str = field(default="text")
    label_column: str = field(default="label")
    max_length: int = field(default=256, metadata={"help": "tokens; what is longer is cut"})
    metrics: list[str] = field(
        default_factory=lambda: [str(metric_path("accuracy"))],  # a file of ours, which needs no connection
        metadata={"help": "names or files that evaluate.load takes"},
    )


@dataclass
class ShrinkArguments:
    """How much smaller the model becomes, and when."""

    ratio: float = field(default=0.5, metadata={"help": "the fraction of the blocks' parameters to remove"})
    method: str = field(default="movement", metadata={"help": "taylor, fisher, movement or magnitude"})
    recipe: str | None = field(default=None, metadata={"help": "a YAML file, in place of ratio and method"})
    start: float = field(default=0.1, metadata={"help": "the fraction of the training before pruning begins"})
    end: float = field(default=0.7, metadata={"help": "the fraction of the training after which it has ended"})
    portable: bool = field(
        default=False, metadata={"help": "only what stock transformers can load, also where the recipe does not say it"}
    )

    def callback(self) -> ShrinkCallback:
        step = {"what": "width", "method": self.method, "ratio": self.ratio}
        recipe: Any = self.recipe or {"steps": [{"prune": step}]}
        return ShrinkCallback(recipe, start=self.start, end=self.end, portable=self.portable or None)


def load_data(args: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train and to measure on, the label a `ClassLabel` in the column "labels"."""
    if args.dataset_name is not None:
        found = datasets.load_dataset(args.dataset_name)
        train, validation = found["train"], found[args.validation_split]
    elif args.train_file is not None and args.validation_file is not None:
        files = {"train": args.train_file, "validation": args.validation_file}
        found = datasets.load_dataset(args.train_file.rsplit(".", 1)[-1], data_files=files)
        train, validation = found["train"], found["validation"]
    else:
        raise SystemExit("give --dataset_name, or --train_file and --validation_file")
    if not isinstance(train.features[args.label_column], datasets.ClassLabel):
        train, validation = (
            rows.cast_column(args.label_column, datasets.Value("string")) for rows in (train, validation)
        )
        names = datasets.ClassLabel(names=in_order(set(train[args.label_column])))
        train, validation = (rows.cast_column(args.label_column, names) for rows in (train, validation))
    return train.rename_column(args.label_column, "labels"), validation.rename_column(args.label_column, "labels")


def in_order(names: set[str]) -> list[str]:
    """Names of classes sorted, as numbers where all are whole ones, so that 0, 1, 2, 10 do not become 0, 1, 10, 2."""
    found = sorted(names)
    return sorted(found, key=int) if all(name.removeprefix("-").isdecimal() for name in found) else found


def main(words: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((DataArguments, ShrinkArguments, TrainingArguments))
    data, shrink, training = parser.parse_args_into_dataclasses(words)
    set_seed(training.seed)

    train, validation = load_data(data)
    names = train.features["labels"].names
    tokenizer = AutoTokenizer.from_pretrained(data.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        data.model_name_or_path, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )

    def tokenize(rows: dict[str, Any]) -> Any:
        return tokenizer(rows[data.text_column], truncation=True, max_length=data.max_length)

    def columns(rows: datasets.Dataset) -> datasets.Dataset:
        return rows.map(tokenize, batched=True, remove_columns=[c for c in rows.column_names if c != "labels"])

    metrics = [evaluate.load(name) for name in data.metrics]

    def compute_metrics(predicted: EvalPrediction) -> dict[str, float]:
        chosen = predicted.predictions.argmax(-1)
        found: dict[str, float] = {}
        for metric in metrics:
            found |= metric.compute(predictions=chosen, references=predicted.label_ids)
        return found

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=columns(train),
        eval_dataset=columns(validation),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    shrink.callback().attach(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    measured = trainer.evaluate()
    trainer.log_metrics("eval", measured)
    trainer.save_model()  # the small model, its card and its record; with --push_to_hub on the Hub too
    return measured


if __name__ == "__main__":
    main(sys.argv[1:])
