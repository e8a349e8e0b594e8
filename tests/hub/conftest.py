"""A Hub on loopback, the client that talks to it, and folders to push."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http as client
import pytest
from hub.repositories import Hub, User
from hub.server import Server, serving
from huggingface_hub import constants
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink.cli import main
from hf_shrink.hub import failures

OWNER, READER, STRANGER = "hf_OwnerOwnerOwner", "hf_ReaderReaderReader", "hf_StrangerStranger"
TOKENS = (OWNER, READER, STRANGER)


def users() -> dict[str, User]:
    return {OWNER: User("me", organizations=("team",)), READER: User("me", role="read"), STRANGER: User("you")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Empty, with the owner's token at hand. Xet is off: uploads go by the LFS protocol, which the server speaks."""
    with serving(Hub(users())) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which would remember another address
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", OWNER)
        # Nobody waits: neither the client between its tries, nor we between ours.
        monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(failures, "WAITS", (0.0, 0.0))
        yield server


class Screen:
    """What is printed, kept to the end of the test."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self.all = ""

    def read(self) -> tuple[str, str]:
        """stdout and stderr since the last time."""
        out, err = self._capfd.readouterr()
        self.all += out + err
        return out, err


@pytest.fixture
def screen(capfd: pytest.CaptureFixture[str]) -> Screen:
    return Screen(capfd)


@pytest.fixture(autouse=True)
def no_token_anywhere(hub: Server, screen: Screen, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After every test: no token in what was printed, logged or pushed."""
    for name in ("huggingface_hub", "transformers", "hf_shrink"):
        caplog.set_level(logging.DEBUG, logger=name)
    yield
    screen.read()
    for token in TOKENS:
        assert token not in screen.all + caplog.text
        for repository in hub.hub.repositories.values():
            for branch in repository.branches:
                for name, content in repository.files(branch).items():
                    assert token.encode() not in content, name


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model on the disk, with a card."""
    folder = tmp_path_factory.mktemp("hub") / "private-place" / "source"
    tiny_llama(num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


RUN = ("--set=quantize.method=rtn", "--set=calibration.samples=2", "--set=calibration.length=16", "--quiet")
MEASURED = ("--set=evaluation.samples=2", "--set=evaluation.length=16")


@pytest.fixture(scope="session")
def finished(source: Path) -> Path:
    """The output folder of a run; not to be changed."""
    output = source.parent / "small"
    assert main(["run", str(source), "--output", str(output), *RUN, *MEASURED]) == 0
    return output


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "small"))
