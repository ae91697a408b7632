"""A pool of small tasks of many kinds, made offline: some for development, some locked, some for one table alone."""

from precond.lab.workloads.pool.halves import BLIND, CONFIRMATION, DEVELOPMENT, FINAL, HELD_OUT, LOCKED, OPENED, SEALED, Half
from precond.lab.workloads.pool.member import Family, Member
from precond.lab.workloads.pool.tasks import POOL, REFERENCE, RULES, members, pool_tasks

__all__ = [
    "BLIND",
    "CONFIRMATION",
    "DEVELOPMENT",
    "FINAL",
    "HELD_OUT",
    "LOCKED",
    "OPENED",
    "POOL",
    "REFERENCE",
    "RULES",
    "SEALED",
    "Family",
    "Half",
    "Member",
    "members",
    "pool_tasks",
]
