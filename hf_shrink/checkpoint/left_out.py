"""What a checkpoint stores and the model's class has no place for, such as layers that predict more tokens at once.

transformers leaves it out with a warning that progress bars hide, so that it is neither in a result nor saved by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from hf_shrink.checkpoint.shards import find_shards, read_header
from hf_shrink.checkpoint.source import Source

NAMED = 3  # names that a note has


@dataclass(frozen=True)
class LeftOut:
    """Tensors of the source's files that its model was loaded without.

    Attributes:
        names: as stored, in their order, without those that the class itself says to ignore.
        bytes: of those of `names`.
        ignored: bytes of those that the class says to ignore.
    """

    names: tuple[str, ...] = ()
    bytes: int = 0
    ignored: int = 0

    @property
    def note(self) -> str | None:
        """One line for the user; None where there is nothing to be said."""
        if not self.names:
            return None
        count = len(self.names)
        more = f" and {count - NAMED} more" if count > NAMED else ""
        return (
            f"{count} tensor{'s' if count > 1 else ''} of the source ({self.bytes / 1e6:.4g} MB) that its class has no "
            f"place for {'are' if count > 1 else 'is'} left out, and counted nowhere: "
            f"{', '.join(self.names[:NAMED])}{more}"
        )


def left_out(source: Source, model: PreTrainedModel) -> LeftOut:
    """What of the source's files is not in `model`, which was loaded from it and is as it was then.

    Raises:
        CheckpointError: a file is damaged.
    """
    entries: dict[str, Any] = {}
    for shard in source.shards or find_shards(source.name, source.folder):
        entries |= read_header(shard)
    known = model.state_dict()
    conversions = get_model_conversion_mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    unknown: dict[str, str] = {}
    for name in sorted(entries, key=dot_natural_key):  # the order of from_pretrained, which some renamings count on
        renamed = rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0]
        if renamed not in known and name not in known:
            unknown[name] = renamed
    said: Any = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unknown.values()))
    model._adjust_missing_and_unexpected_keys(said)  # takes out what the class says to ignore
    sizes = {name: entries[name]["data_offsets"][1] - entries[name]["data_offsets"][0] for name in unknown}
    names = tuple(name for name in unknown if unknown[name] in said.unexpected_keys)
    told = sum(sizes[name] for name in names)
    return LeftOut(names, told, sum(sizes.values()) - told)
