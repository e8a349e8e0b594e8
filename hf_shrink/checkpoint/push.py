"""A shrunken model, or the output folder of a run, to the Hub, with everything that belongs to it."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_shrink.checkpoint.record import CARD_NAME, RECORD_NAME, ShrinkRecord
from hf_shrink.checkpoint.staging import check_whole, named_in_card, put_text, staged
from hf_shrink.errors import HubError
from hf_shrink.hub import Destination, Pushed, check_destination, upload
from hf_shrink.reporting import write_report
from hf_shrink.reporting.figures import display_name, headline

logger = logging.get_logger(__name__)
LONGEST = 120  # characters of a commit message's first line


def push_folder(
    directory: str | os.PathLike[str],
    destination: Destination,
    *,
    message: str | None = None,
    description: str | None = None,
) -> Pushed:
    """Push the output folder of a run as it is.

    Args:
        directory: with weights, config, shrink.json and model card. What training leaves (`checkpoint-*`, `*.bin`, ...)
            and hidden files stay behind, but for weights in folders of modules.json; paths of this machine are taken
            out of the pushed shrink.json.
        destination: need not be checked before.
        message: of the commit; None: what was done and what came of it.
        description: the rest of the commit message.

    Raises:
        CheckpointError: the folder is not whole, or not of hf_shrink.
        HubError: the Hub will not take it; nothing was sent, unless the message says so.
        PushInterrupted: it broke off; the message has the command that goes on.
    """
    folder = Path(directory)
    record = check_whole(folder)
    return _push(folder, record, check_destination(destination, RECORD_NAME), message, description)


def push_shrunk_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    tokenizer: Any = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Push a shrunken model with its record, report and model card. `model.push_to_hub` does the same.

    Whether the push may go there is asked before anything is saved. When it breaks off, what was saved is kept, and the
    message says the command that goes on.

    Args:
        model: as `shrink` or `from_pretrained` gave it, or the output folder of a run.
        repo_id: "owner/name", or a name alone for the token's owner.
        tokenizer: tokenizer or processor to put beside it.
        commit_message: None: what was done and what came of it.
        private: whether a repository that is made by this is private; None: as its owner's settings say.
        token: None: the one that `hf auth login` or HF_TOKEN gives.
        revision: a branch (made when it is not there), or "refs/pr/N" to go on with a pull request.
        create_pr: open a pull request.
        overwrite: also into a repository that hf_shrink did not make.
        max_shard_size: of a file of weights, as of `save_pretrained`.
        tags: for the model card, besides its own.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        HubError: no token, no permission, or a name that holds something else.
        CheckpointError: the model was not made by hf_shrink, or the folder is not whole.
        PushInterrupted: the push broke off.
        KeyboardInterrupt: it was stopped.
    """
    destination = Destination(repo_id, private, revision, create_pr, overwrite, token)
    if not isinstance(model, PreTrainedModel):
        if tokenizer is not None or tags:
            raise HubError("tokenizer and tags are for a model in memory; put them into the folder before it is pushed")
        return push_folder(model, destination, message=commit_message, description=commit_description).commit
    record = getattr(model, "shrink_record", None)
    if record is None:
        raise HubError(
            "this model has no record of hf_shrink; push what `shrink` returned, or the folder of a run, or call the "
            "model's own push_to_hub"
        )
    destination = check_destination(destination, RECORD_NAME)
    folder = Path(tempfile.mkdtemp(prefix=f"{destination.repo_id.split('/')[-1]}-"))
    try:
        _save(model, folder, record, destination.repo_id, max_shard_size or "50GB", tokenizer, tags or [])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # Not removed when this fails: the message names it.
    pushed = _push(folder, record, destination, commit_message, commit_description)
    shutil.rmtree(folder, ignore_errors=True)
    return pushed.commit


def commit_message(record: ShrinkRecord) -> str:
    """One line: what was done and what came of it, as far as it was measured."""
    said = headline(record.report)
    line = f"{display_name(record)}{f': {said}' if said else ''}"
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def _push(
    folder: Path, record: ShrinkRecord, destination: Destination, message: str | None, description: str | None
) -> Pushed:
    with staged(folder, destination.token) as (stage, left):
        if left:
            logger.warning(f"not pushed: {', '.join(left)}")
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        named = named_in_card(card, (folder.resolve().name, display_name(record)), destination.repo_id)
        put_text(stage / CARD_NAME, named)
        version = record.versions.get("hf_shrink", "")
        again = f"hf-shrink push {shlex.quote(str(folder))}"
        made_by = f"Made by hf_shrink {version}"
        return upload(stage, destination, message or commit_message(record), description or made_by, again=again)


def _save(
    model: PreTrainedModel,
    folder: Path,
    record: ShrinkRecord,
    repo_id: str,
    max_shard_size: int | str,
    tokenizer: Any,
    tags: list[str],
) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_report(folder, record, name=repo_id)
    card = folder / CARD_NAME
    if record.card is not None:
        card.write_text(record.card, encoding="utf-8")
    if tags:
        loaded = ModelCard.load(card)
        loaded.data.tags = list(dict.fromkeys([*(loaded.data.tags or []), *tags]))
        loaded.save(card)
