"""skorch: recipes that observe the model's layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from precond.optim.optimizer.parameters import ModuleGroups


class WithModel:
    """Mixed into a net, hands ``module_`` to its optimizer: ``class Net(WithModel, skorch.NeuralNetClassifier)``.

    Then ``optimizer=precond.optim.Auto`` can observe layer inputs, and second passes are protected. Groups by
    ``optimizer__param_groups`` stay.
    """

    module_: Any

    def get_params_for_optimizer(self, prefix: str, named_parameters: Iterable[tuple[str, Tensor]]) -> tuple[Any, Any]:
        (groups, *rest), options = super().get_params_for_optimizer(prefix, named_parameters)  # type: ignore[misc]
        return (ModuleGroups(groups, self.module_), *rest), options
