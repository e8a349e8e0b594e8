"""Take pieces out of a fast tokenizer, so that every text still comes back as it did.

A tokenizer is worked on as the JSON text of the `tokenizers` library. One file a kind of model (`bpe.py`,
`wordpiece.py`, `unigram.py`) says which pieces spell everything else; `rewrite.py` writes the smaller tokenizer,
`verify.py` compares the two, `install.py` puts it into the transformers object.
"""

from __future__ import annotations

from hf_shrink.surgery.tokenizer.install import fast_json, install
from hf_shrink.surgery.tokenizer.pieces import Pieces
from hf_shrink.surgery.tokenizer.rewrite import Rewritten, pieces_of, rewrite, token_table
from hf_shrink.surgery.tokenizer.verify import AWKWARD, check_ids, check_pieces, check_round_trips

__all__ = [
    "AWKWARD",
    "Pieces",
    "Rewritten",
    "check_ids",
    "check_pieces",
    "check_round_trips",
    "fast_json",
    "install",
    "pieces_of",
    "rewrite",
    "token_table",
]
