"""The seventh set, blind: written by someone who may train with torch's AdamW alone, and knew no result of ``auto`` on its models."""

from precond.lab.workloads.pool.blind.members import MEMBERS

__all__ = ["MEMBERS"]
