"""The processes that run one model together."""

from .processes import ALONE, Group, connected, join

__all__ = ["ALONE", "Group", "connected", "join"]
