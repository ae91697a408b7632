"""Real data sets, models and trainings for experiments."""

from precond.workloads.catalog import DATA, load_data, load_workload
from precond.workloads.checkpoint import Checkpoint, CheckpointError
from precond.workloads.curve import Curve, Outcome
from precond.workloads.entrant import Entrant, Peer, Recipe
from precond.workloads.evaluation import Score, evaluate
from precond.workloads.factory import FactoryError
from precond.workloads.files import WriteError, sweep, write_atomically
from precond.workloads.idx import DataError, read_idx
from precond.workloads.models import Architecture, count_parameters
from precond.workloads.problem import BuiltIn, Problem, Workload
from precond.workloads.search import Aim, Judge, LogUniform, Search, Trial
from precond.workloads.study import Contender, LrFrom, Task
from precond.workloads.syntax import parse_entrants
from precond.workloads.training import Interrupted, Plan, train

__all__ = [
    "DATA",
    "Aim",
    "Architecture",
    "BuiltIn",
    "Checkpoint",
    "CheckpointError",
    "Contender",
    "Curve",
    "DataError",
    "Entrant",
    "FactoryError",
    "Interrupted",
    "Judge",
    "LogUniform",
    "LrFrom",
    "Outcome",
    "Peer",
    "Plan",
    "Problem",
    "Recipe",
    "Score",
    "Search",
    "Task",
    "Trial",
    "Workload",
    "WriteError",
    "count_parameters",
    "evaluate",
    "load_data",
    "load_workload",
    "parse_entrants",
    "read_idx",
    "sweep",
    "train",
    "write_atomically",
]
