"""The fourth set: held out until ``auto`` is final, written as the third was, for one table that is made once."""

from precond.lab.workloads.pool.held_out.members import MEMBERS

__all__ = ["MEMBERS"]
