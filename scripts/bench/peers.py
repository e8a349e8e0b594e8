"""The peers: other tools, each in an environment of its own, run by one script on the common protocol."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import about, folder_bytes, run_fresh
from variants import DEFAULT_ITERATIONS, Setting, Variant

LENGTH = 512
HELD_OUT_WINDOWS = 40  # the runner's own, and not an option of it
KIB_IN_MB = 1.024  # the runner counts peak memory in units of 1000 KiB


@dataclass(frozen=True)
class Peer:
    """One tool.

    Attributes:
        environment: its folder below the peers' home, and the name that the peers' setup.sh takes.
        packages: what decides its result; their versions are recorded.
        bits: of a tool with a format of its own, which is measured once; None where bits, group and symmetry are asked.
        saves: the runner writes its checkpoint, so that bytes can be counted.
        own: a script of ours, which takes a job and says what came of it, in place of the peers' runner.
    """

    name: str
    environment: str
    packages: tuple[str, ...]
    bits: int | None = None
    saves: bool = False
    own: str | None = None

    def settings(self, asked: Sequence[Setting], group: int) -> list[Setting]:
        """At which settings it is measured beside those `asked` of ours."""
        if self.bits is None:
            return list(asked)
        if self.bits not in {s.bits for s in asked}:
            return []
        return [OWN_FORMATS[self.name](group)]


# What the tools without options store: NF4's blocks of 64 are bitsandbytes' default; torchao's int4 on CPU has zero
# points; quanto's has them too, and chooses its groups (96 for a width of 576).
OWN_FORMATS = {
    "bitsandbytes-nf4": lambda group: Setting(4, 64, True, "nf4"),
    "bitsandbytes-int8": lambda group: Setting(8, None, True, "llm.int8"),
    "torchao-int4": lambda group: Setting(4, group, False),
    "quanto-int4": lambda group: Setting(4, None, False, "own-groups"),
}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("llmcompressor-gptq", "llmcompressor", ("llmcompressor", "compressed-tensors"), saves=True),
        Peer("autoround", "autoround", ("auto-round",), saves=True, own="autoround.py"),
        Peer("gptqmodel", "gptqmodel", ("gptqmodel", "optimum"), saves=True),
        Peer("bitsandbytes-nf4", "base", ("bitsandbytes",), bits=4),
        Peer("bitsandbytes-int8", "base", ("bitsandbytes",), bits=8),
        Peer("torchao-int4", "torchao", ("torchao",), bits=4),
        Peer("quanto-int4", "quanto", ("optimum-quanto",), bits=4),
    )
}


@dataclass(frozen=True)
class Runner:
    """Where the peers are, and on what they are measured."""

    script: Path
    home: Path
    model: Path
    calibration: Path
    held_out: tuple[Path, ...]
    samples: int
    threads: int

    def python(self, peer: Peer) -> Path:
        return self.home.expanduser() / peer.environment / "bin" / "python"

    def missing(self, peer: Peer) -> str | None:
        """Why the peer cannot run; None where it can."""
        if self.python(peer).is_file():
            return None
        return f"not installed: bash {self.script.parent / 'setup.sh'} {peer.environment}"

    def command(self, variant: Variant, output: Path) -> list[str]:
        """The command line of one measurement."""
        peer, setting = PEERS[variant.name], variant.setting
        assert setting is not None
        if peer.own is not None:
            script = Path(__file__).resolve().with_name(peer.own)
            return [str(self.python(peer)), str(script), json.dumps(self._job(variant, output))]
        command = [str(self.python(peer)), str(self.script), peer.name, "--bits", str(setting.bits)]
        if setting.group is not None:
            command += ["--group", str(setting.group)]
        if peer.bits is None and not setting.symmetric:
            command.append("--asymmetric")
        if variant.iterations is not None:
            command += ["--iters", str(variant.iterations)]
        command += ["--model", str(self.model), "--calibration", str(self.calibration), "--heldout"]
        command += [str(path) for path in self.held_out]
        return [*command, "--samples", str(self.samples), "--threads", str(self.threads), "--output", str(output)]

    def _job(self, variant: Variant, output: Path) -> dict[str, Any]:
        assert variant.setting is not None
        setting = variant.setting.to_dict()
        return {
            "model": str(self.model),
            "calibration": str(self.calibration),
            "held_out": [str(path) for path in self.held_out],
            "samples": self.samples,
            "held_out_samples": HELD_OUT_WINDOWS,
            "length": LENGTH,
            **{name: setting[name] for name in ("bits", "group", "symmetric")},
            "iterations": variant.iterations,
            "threads": self.threads,
            "output": str(output),
        }

    def run(self, variant: Variant) -> dict[str, Any]:
        """Measure. Raises RuntimeError where the peer fails or measured something else than was asked."""
        peer = PEERS[variant.name]
        described = {**about(), "versions": installed_versions(self.python(peer), peer.packages)}
        with tempfile.TemporaryDirectory() as folder:
            printed = run_fresh(self.command(variant, Path(folder)), self.threads)
            size = folder_bytes(Path(folder)) if peer.saves else None
        if peer.own is None:
            printed = read(printed, variant, [path.stem for path in self.held_out], self.threads)
        return {
            **variant.to_dict(),
            **printed,
            "weight_bytes": size,
            "about": described,
        }


def peer_variants(
    names: Iterable[str], asked: Sequence[Setting], group: int, iterations: int = DEFAULT_ITERATIONS
) -> tuple[list[Variant], dict[str, str]]:
    """What of the peers is to be measured beside `asked`, and why some are not, by name."""
    chosen, left_out = [], {}
    for name in names:
        peer = PEERS[name]
        found = peer.settings(asked, group)
        steps = iterations if name == "autoround" else None
        chosen += [Variant(name, "peer", setting, steps) for setting in found]
        if not found:
            left_out[name] = f"has {peer.bits} bits only, which --bits does not name"
    return chosen, left_out


def read(printed: dict[str, Any], variant: Variant, domains: Sequence[str], threads: int) -> dict[str, Any]:
    """The runner's JSON line in our words. Raises RuntimeError where it is about something else than was asked."""
    asked: dict[str, Any] = {"peer": variant.name, "threads": threads}
    if PEERS[variant.name].bits is None:
        assert variant.setting is not None
        asked |= {"bits": variant.setting.bits, "group": variant.setting.group, "symmetric": variant.setting.symmetric}
    wrong = [
        f"{key} {printed.get(key)} in place of {value}" for key, value in asked.items() if printed.get(key) != value
    ]
    if missing := [domain for domain in domains if domain not in printed.get("perplexity", {})]:
        wrong.append(f"no perplexity on {', '.join(missing)}")
    if wrong:
        raise RuntimeError(f"{variant.id} measured something else: {'; '.join(wrong)}")
    return {
        "seconds_with_loading": printed["seconds"],
        "peak_mb": round(printed["peak_rss_mb"] * KIB_IN_MB, 1),
        "decode_tokens_per_second": printed.get("decode_tokens_per_second"),
        "perplexity": {domain: printed["perplexity"][domain] for domain in domains},
        "threads": printed["threads"],
    }


def installed_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of `packages`, torch and transformers in a peer's environment, and of its Python."""
    code = (
        "import json, platform, sys; from importlib import metadata as m\n"
        "def v(p):\n try: return m.version(p)\n except m.PackageNotFoundError: return 'not installed'\n"
        "print(json.dumps({'python': platform.python_version(), **{p: v(p) for p in sys.argv[1:]}}))"
    )
    names = [*packages, "torch", "transformers"]
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
