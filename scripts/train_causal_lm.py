"""Fine-tune a causal language model on text files for few bits, and save it packed.

    python scripts/train_causal_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --train_file train.txt --validation_file validation.txt --recipe w4a16 --output_dir smaller \
        --learning_rate 2e-5 --num_train_epochs 1 --per_device_train_batch_size 8

The callback is all that differs from an ordinary fine-tuning. `--recipe` is what `hf-shrink run` takes: a built-in name
or the path of a YAML file, with a quantize step, a prune step of heads and channels or of weights, or both. With
`portable: true` there, or --portable, it only does what stock transformers can load.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field

import torch
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_shrink import ShrinkCallback
from hf_shrink.evaluation.metrics import load_metric


@dataclass
class Arguments:
    """What is trained on what, and how it is made smaller."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the dense model"})
    train_file: str = field(metadata={"help": "text to train on"})
    validation_file: str = field(metadata={"help": "held-out text to evaluate on"})
    recipe: str = field(default="w4a16", metadata={"help": "built-in recipe or path of a YAML file"})
    start: float = field(default=0.0, metadata={"help": "fraction of the steps after which weights are rounded"})
    portable: bool = field(
        default=False, metadata={"help": "only what stock transformers can load, also where the recipe does not say it"}
    )
    block_size: int = field(default=256, metadata={"help": "tokens of a training sequence"})


def blocks_of(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Both files as rows of `block_size` tokens; what is left over at the end is dropped."""
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    texts = load_dataset("text", data_files=files, sample_by="document")
    size = arguments.block_size

    def cut(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for text in tokenizer(rows["text"])["input_ids"] for token in text]
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    return texts.map(cut, batched=True, remove_columns="text")


def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows,) the summed negative log-likelihood of each row: all that is kept of the logits."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
    return losses.sum(1)


def main(words: list[str] | None = None) -> dict[str, float]:
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(words)
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    data = blocks_of(arguments, tokenizer)

    with tempfile.TemporaryDirectory() as cache:
        metric = load_metric("perplexity", cache)

        def perplexity(found: EvalPrediction) -> dict[str, float]:
            counts = [len(labels) - 1 for labels in found.label_ids]
            return {"perplexity": metric.compute(predictions=found.predictions, references=counts)["perplexity"]}

        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
            data_collator=default_data_collator,
            compute_metrics=perplexity,
            preprocess_logits_for_metrics=losses_of,
        )
        callback = ShrinkCallback(
            arguments.recipe,
            start=arguments.start,
            end=max(arguments.start, 0.7),
            portable=arguments.portable or None,
        )
        callback.attach(trainer)
        trainer.log_metrics("dense", trainer.evaluate())
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        measured = trainer.evaluate()
        trainer.log_metrics("packed", measured)
    trainer.save_model()  # packed, with its card and its record; with --push_to_hub on the Hub too
    return measured


if __name__ == "__main__":
    main(sys.argv[1:])
