"""The third set: written by someone who did not know how ``auto`` does on it, for one table that is made once."""

from precond.lab.workloads.pool.confirmation.members import MEMBERS

__all__ = ["MEMBERS"]
