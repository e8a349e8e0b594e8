"""Which module of which model plays which role: the only place with model names."""

from hf_shrink.architectures.binding import Binding, bind, known_families

__all__ = ["Binding", "bind", "known_families"]
