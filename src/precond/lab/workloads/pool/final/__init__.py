"""The sixth set, for a final table: written as the fifth was, by someone who did not know how ``auto`` does on it."""

from precond.lab.workloads.pool.final.members import MEMBERS

__all__ = ["MEMBERS"]
