"""Real data sets, models and trainings for experiments."""

from precond.lab.workloads.catalog import DATA, load_data, load_workload
from precond.lab.workloads.checkpoint import Checkpoint, CheckpointError
from precond.lab.workloads.curve import Curve, Outcome
from precond.lab.workloads.entrant import Entrant, Peer, Recipe
from precond.lab.workloads.evaluation import Score, evaluate
from precond.lab.workloads.factory import FactoryError
from precond.lab.workloads.files import WriteError, sweep, write_atomically
from precond.lab.workloads.idx import DataError, read_idx
from precond.lab.workloads.models import Architecture, count_parameters
from precond.lab.workloads.problem import BuiltIn, Problem, Workload
from precond.lab.workloads.search import Aim, Judge, LogUniform, Search, Trial
from precond.lab.workloads.study import Contender, LrFrom, Task
from precond.lab.workloads.syntax import parse_entrants
from precond.lab.workloads.training import Interrupted, Plan, train

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
