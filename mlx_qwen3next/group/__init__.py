"""The processes that run one model together, and how they agree.

All run the same program. Arrays go through MLX's collectives (``mx.distributed``: ring, JACCL,
MPI, NCCL). Rank 0 decides all that may differ from process to process (by the clock, by a client,
by chance): arrays in the graph (:meth:`Group.agree`), all else over connections of our own
(:meth:`Group.decide`), which neither wait for the device nor keep it waiting. Over the same
connections every process learns at once that another has ended.
"""

from .group import ALONE, Group
from .joining import connected, join

__all__ = ["ALONE", "Group", "connected", "join"]
