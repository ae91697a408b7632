"""A pool of small tasks of many kinds, made offline: half for development, half locked."""

from precond.lab.workloads.pool.halves import DEVELOPMENT, LOCKED
from precond.lab.workloads.pool.member import Family, Member
from precond.lab.workloads.pool.tasks import POOL, REFERENCE, RULES, Half, members, pool_tasks

__all__ = ["DEVELOPMENT", "LOCKED", "POOL", "REFERENCE", "RULES", "Family", "Half", "Member", "members", "pool_tasks"]
