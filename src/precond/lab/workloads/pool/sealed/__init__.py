"""The fifth set: sealed until ``auto`` is final, written as the third and the fourth were, for one table that is made once."""

from precond.lab.workloads.pool.sealed.members import MEMBERS

__all__ = ["MEMBERS"]
