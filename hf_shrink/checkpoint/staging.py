"""What of an output folder goes to others: everything a model needs, and nothing of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import get_token

from hf_shrink.checkpoint.record import CARD_NAME, RECORD_NAME, ShrinkRecord, read_record
from hf_shrink.checkpoint.shards import find_shards, read_json
from hf_shrink.checkpoint.side_files import MODULES, module_files
from hf_shrink.errors import CheckpointError, HubError
from hf_shrink.reporting.reproduce import is_hub_id, without_folders

# What training leaves beside a model, and what is pickled: `training_args.bin` holds the Trainer's token. Of what is
# pickled, only weights that modules.json names go along.
LEFT_BEHIND = (".*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.lock", "*.partial", "checkpoint-*", "runs", "__pycache__")
SEARCHED = 64 << 20  # bytes: files up to that size are searched for the token; weights are not


def check_whole(folder: Path) -> ShrinkRecord:
    """The record of an output folder that can be pushed as it is.

    Raises:
        CheckpointError: there is no such folder, it was not made by hf_shrink, or something of it is missing or broken.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give the output folder of an hf-shrink run")
    if not (folder / RECORD_NAME).is_file():
        raise CheckpointError(f"{folder} has no {RECORD_NAME}; give the output folder of an hf-shrink run")
    record = read_record(folder / RECORD_NAME)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is no model that loads; make it again")
    read_json(folder / "config.json")
    find_shards(str(folder), folder)
    if not (folder / CARD_NAME).is_file():
        raise CheckpointError(f"{folder} has no model card ({CARD_NAME}); `hf-shrink report {folder}` writes it")
    return record


@contextmanager
def staged(folder: Path, token: str | bool | None = None) -> Iterator[tuple[Path, list[str]]]:
    """A folder of links to what is to be pushed, with paths of this machine taken out of shrink.json; and the paths of
    what is left out.

    Raises:
        CheckpointError: modules.json is damaged.
        HubError: a file contains the token.
    """
    listed = folder / MODULES
    wanted = set(module_files(listed)) if listed.is_file() else set()  # pooling and the like may be pickled
    left = [path.name for path in sorted(folder.iterdir()) if _left_behind(path.name, wanted)]
    kept = [path for path in sorted(folder.iterdir()) if path.name not in left]
    _check_no_token(kept, token)
    with TemporaryDirectory(prefix="hf_shrink-push-") as place:
        stage = Path(place)
        for path in kept:
            if path.is_dir():
                ignored = _Ignored(path, wanted)
                shutil.copytree(path.resolve(), stage / path.name, copy_function=_link, ignore=ignored)
                left += ignored.names
            elif path.name == RECORD_NAME:
                record = json.loads(path.read_text(encoding="utf-8"))
                put_text(stage / path.name, json.dumps(public(record), indent=1) + "\n")
            else:
                _link(path.resolve(), stage / path.name)
        yield stage, sorted(left)


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a shrink.json as others may see it: files and folders of this machine by their names."""
    source = str(record["source"])
    return {**without_folders(record), "source": source if is_hub_id(source) else f"./{Path(source).name}"}


def named_in_card(card: str, names: Iterable[str], repo_id: str) -> str:
    """A model card that loads the model from the Hub, where it names a folder here."""
    for name in names:
        card = card.replace(f'from_pretrained("{name}")', f'from_pretrained("{repo_id}")')
        card = card.replace(f'name = "{name}"  #', f'name = "{repo_id}"  #')
    return card


def put_text(path: Path, text: str) -> None:
    """A file with `text` in place of a link, whose target stays as it is."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _left_behind(name: str, wanted: set[str]) -> bool:
    """Of a path within the folder."""
    return name not in wanted and any(fnmatch(name.rpartition("/")[2], pattern) for pattern in LEFT_BEHIND)


class _Ignored:
    """What copytree leaves out of a folder.

    Attributes:
        names: within the output folder, of all that it has left out so far.
    """

    def __init__(self, path: Path, wanted: set[str]) -> None:
        self._name, self._root, self._wanted = path.name, path.resolve(), wanted
        self.names: list[str] = []

    def __call__(self, folder: str, names: list[str]) -> list[str]:
        place = Path(self._name, Path(folder).relative_to(self._root)).as_posix()
        found = [name for name in sorted(names) if _left_behind(f"{place}/{name}", self._wanted)]
        self.names += [f"{place}/{name}" for name in found]
        return found


def _link(source: str | Path, target: str | Path) -> None:
    Path(target).symlink_to(Path(source).resolve())


def _check_no_token(paths: list[Path], token: str | bool | None) -> None:
    """Raises HubError where the token that pushes would be pushed."""
    secret = token if isinstance(token, str) else get_token()
    if not secret:
        return
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    for file in files:
        if file.stat().st_size <= SEARCHED and secret.encode() in file.read_bytes():
            raise HubError(f"{file} contains your token of the Hub; it is not pushed: take the token out of the file")
