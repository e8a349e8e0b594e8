"""Where the weights and activations of a model are that is larger than memory, or than one device."""

from hf_shrink.residence.dispatched import at_home
from hf_shrink.residence.files import flush_folder, map_tensors, write_tensors, writing
from hf_shrink.residence.looked_after import at_work, cast, forget, residence_of, rest, rest_at, twin, visited
from hf_shrink.residence.pages import peak_memory
from hf_shrink.residence.residence import OUTSIDE, Residence
from hf_shrink.residence.room import Room, States, bytes_of

__all__ = [
    "OUTSIDE",
    "Residence",
    "Room",
    "States",
    "at_home",
    "at_work",
    "bytes_of",
    "cast",
    "flush_folder",
    "forget",
    "map_tensors",
    "peak_memory",
    "residence_of",
    "rest",
    "rest_at",
    "twin",
    "visited",
    "write_tensors",
    "writing",
]
