"""The optimizer and its contract with torch, one concern a file; each class adds one to the one below it.

| class | file | concern |
|---|---|---|
| :class:`PreconditionedGD` | ``preconditioned`` | arguments, ``step``, what to look at |
| ``Saving`` | ``saving`` | state dicts, copies, pickles |
| ``Stepping`` | ``stepping`` | a step by kernels where these compute it, by ``engine/loop.py`` else |
| ``SecondGradients`` | ``second_gradients`` | closures and ``probe``: the gradients that a step is made of |
| ``Capturing`` | ``capturing`` | steps that devices decide about, CUDA graphs |
| ``Following`` | ``following`` | what has changed since: the model, groups, state, which gradients there are |
| ``Bound`` | ``bound`` | groups, strategies, state and hooks, and the handing over of state with a step |
| ``torch.optim.Optimizer`` | | |
"""

from precond.optim.optimizer.preconditioned import PreconditionedGD

__all__ = ["PreconditionedGD"]
