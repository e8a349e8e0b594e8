"""lm-eval on a folder of ours, in a process that never imports hf_shrink, and our multiple choice beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import TEXT, tiny_llama, tiny_tokenizer

from hf_shrink import evaluate_model, shrink
from hf_shrink.checkpoint.measured import load_measured
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.runtime.linear import CompressedLinear

TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
found = lm_eval.simple_evaluate(
    "hf",
    f"pretrained={sys.argv[1]},dtype=float32",
    ["local_questions"],
    task_manager=tasks,
    device="cpu",
    batch_size=4,
    bootstrap_iters=0,
)
assert not [name for name in sys.modules if name.startswith("hf_shrink")]
print(json.dumps({k: v for k, v in found["results"]["local_questions"].items() if isinstance(v, float)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in 4 bits."""
    model, path = tiny_llama(hidden_size=96, intermediate_size=128, num_hidden_layers=2), tmp_path_factory.mktemp("w4")
    recipe = {"steps": [{"quantize": {"method": "rtn", "group_size": 32}}], "evaluation": {"metrics": []}}
    shrink(model, recipe, progress=False)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.slow  # nearly all of it imports lm-eval
def test_lm_eval_gives_what_we_give(folder, tmp_path):
    rng, words = np.random.default_rng(0), TEXT.split()[:40]
    rows = [
        {
            "question": " ".join(rng.choice(words, size=6)),
            "choices": [" ".join(rng.choice(words, size=int(rng.integers(1, 6)))) for _ in range(3)],
            "answer": int(rng.integers(3)),
        }
        for _ in range(16)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.replace("FILE", str(file)))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "tasks")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    model = load_measured(folder).model
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.restore()  # stock transformers does not round few inputs to bfloat16, as our kernels do
    for key, normalize in (("acc,none", "none"), ("acc_norm,none", "bytes")):
        recipe = TaskRecipe("mine", "multiple-choice", options={"normalize": normalize})
        ours = evaluate_model(model, rows, tokenizer=tiny_tokenizer(), spec=recipe, metrics=["accuracy"])
        assert ours["model"]["accuracy"]["value"] == pytest.approx(theirs[key]), key
