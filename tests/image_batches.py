"""Batches of images and text for the tiny vision-language models of `conformance.cases`: a dict of inputs each."""

from __future__ import annotations

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
IMAGE, PAD = 4, 0


def llava_batch(length: int = 24, rows: int = 2, seed: int = 0, padded: int = 0) -> Inputs:
    """One image of 16 tokens in every row; `padded` tokens of padding in front of the first row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, padded + 2 : padded + 18] = IMAGE
    ids[0, :padded] = PAD
    mask[0, :padded] = 0
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def qwen_batch(grids: tuple[tuple[int, int], ...] = ((4, 4),), text: int = 9, seed: int = 0) -> Inputs:
    """One row with an image of each grid (height, width in patches of 4 x 4, merged 2 x 2) among `text` tokens."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randint(5, 300, (3,), generator=generator)]
    for height, width in grids:
        pieces += [torch.full((height * width // 4,), IMAGE), torch.randint(5, 300, (2,), generator=generator)]
    pieces.append(torch.randint(5, 300, (text,), generator=generator))
    ids = torch.cat(pieces)[None]
    patches = sum(height * width for height, width in grids)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def text_batch(length: int = 12, rows: int = 1, seed: int = 9) -> Inputs:
    ids = torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def batches_for(name: str) -> list[Inputs]:
    """Batches of different lengths and numbers of images, one of them without any."""
    if name.startswith("llava"):
        return [llava_batch(24), text_batch(), llava_batch(21, rows=1, seed=1), llava_batch(26, seed=2, padded=4)]
    return [qwen_batch(), text_batch(), qwen_batch(((2, 6),), seed=1), qwen_batch(((6, 4), (2, 2)), seed=2)]
