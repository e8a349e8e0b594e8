"""Documents of a text, one by one, as long as more are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_shrink.calibration.chats import RefusedChat
from hf_shrink.calibration.recipes import DataRecipe, from_parquet, iterate, load_recipe, load_rows
from hf_shrink.calibration.text import Document, document_of, encode, read_lines, read_text, text_columns
from hf_shrink.errors import CalibrationError

_AT_ONCE = 100_000  # characters of a long text that are handed out together


def documents(source: str, tokenizer: PreTrainedTokenizerBase, seed: int, refused: list[str]) -> Iterator[Document]:
    """The documents of a .txt (its paragraphs, some together), .jsonl or .parquet file, or of a data recipe of text.

    For what counts tokens and needs no windows.

    Args:
        refused: gets the reasons for which the chat template refuses chats, which are left out.

    Raises:
        CalibrationError: there is no such data, it is not text, or the template refuses all of it.
    """
    path = Path(source)
    if path.suffix == ".txt":
        yield from _pieces(read_text(path))
        return
    if path.suffix == ".jsonl":
        yield from _of_rows(iter(read_lines(path)), (), (), tokenizer, refused)
        return
    if path.suffix == ".parquet":
        if not path.is_file():
            raise CalibrationError(f"there is no file {path}")
        rows = from_parquet(path)
        yield from _of_rows(iter(rows), rows.column_names, (), tokenizer, refused)
        return
    recipe = load_recipe(source)
    if recipe.kind not in ("text", "chat"):
        raise CalibrationError(f"data {source!r} is {recipe.kind}, not text; name a file or a data recipe of text")
    yield from _of_recipe(recipe, tokenizer, seed, refused)


def _of_recipe(
    recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, seed: int, refused: list[str]
) -> Iterator[Document]:
    rows = load_rows(recipe, "calibration", seed)
    names = list(rows.column_names or ())
    if recipe.join is None:
        yield from _of_rows(iterate(rows, recipe), names, recipe.columns, tokenizer, refused)
        return
    column = text_columns(names, recipe.columns)[0]
    yield from (str(row[column]) for row in iterate(rows, recipe))


def _of_rows(
    rows: Iterator[Mapping[str, Any]],
    names: Sequence[str],
    wanted: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    refused: list[str],
) -> Iterator[Document]:
    first = next(rows, None)
    if first is None:
        raise CalibrationError("the text has no rows")
    columns = text_columns(list(names) or list(first), wanted, first)
    yield from documents_of(chain([first], rows), columns, tokenizer, refused)


def documents_of(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, refused: list[str]
) -> Iterator[Document]:
    """The rows as documents, without chats that the chat template refuses; its reasons are added to `refused`.

    Raises CalibrationError as `document_of`, and when the template refuses every row.
    """
    left = False
    for row in rows:
        try:
            document = document_of(row, columns, tokenizer)
        except RefusedChat as error:
            refused.append(str(error))
            continue
        left = True
        yield document
    if refused and not left:
        raise CalibrationError(
            f"the chat template refuses all {len(refused)} chats, the first because of: {refused[0]}; bring their "
            "messages into the form that the template takes, or give the text itself"
        )


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end where a paragraph does."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + _AT_ONCE)
        stop = len(text) if cut < 0 else cut
        yield text[start:stop]
        start = stop


def tokens_of(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of one document, without special tokens around it."""
    return encode([document], tokenizer)[0] if isinstance(document, str) else list(document)
