"""Adam for tables of parameters of which a step reads a few rows."""

from typing import Any

import torch
from torch import Tensor


class TableAdam(torch.optim.Adam):
    r"""Adam, with updates of rows for parameters whose gradients are sparse.

    For a row that later steps do not read, Adam still decays both moments, and moves the row on by what is left of its
    momentum. With the second moment v after a gradient g, this is

    .. math:: \sum_{j \ge 0} \eta \frac{(1 - \beta_1) \beta_1^j g}{\sqrt{\beta_2^j v}}
        = \eta \frac{1 - \beta_1}{1 - \beta_1 / \sqrt{\beta_2}} \frac{g}{\sqrt{v}}

    in all, at a constant rate :math:`\eta`. Here the row moves so far at once, so that it has no momentum to keep. Its
    second moment decays by the number of steps since the step s that last read it, exactly as that of Adam:
    :math:`v_t = \beta_2^{t - s} v_s + (1 - \beta_2) g^2`, divided by :math:`1 - \beta_2^t`. Where rows come again
    before their momentum is spent, this differs from Adam by when they move, and hardly by how far.

    Args:
        params: the parameters.
        options: the options of ``torch.optim.Adam``, whose betas must satisfy :math:`\beta_1^2 < \beta_2`.

    Example:
        >>> table = torch.zeros(1000, 2, requires_grad=True)
        >>> adam = TableAdam([table], lr=0.1)
        >>> table.grad = torch.sparse_coo_tensor([[3]], [[1.0, -1.0]], table.shape, check_invariants=True)
        >>> adam.step()
        >>> table[3].sign(), table.count_nonzero()
        (tensor([-1.,  1.], grad_fn=<SignBackward0>), tensor(2))
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; gradients that are sparse are dropped after it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._move_rows(parameter, parameter.grad.coalesce(), group)
                    parameter.grad = None
        return super().step(closure)

    def _move_rows(self, table: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[table], group["betas"]
        if not state:
            # Torch loads states in the dtype of their parameter, hence no integers.
            state["step"] = torch.zeros((), dtype=torch.get_default_dtype())
            state["exp_avg_sq"], state["last_step"] = torch.zeros_like(table), torch.zeros_like(table[..., :1])
        state["step"] += 1
        t, (ids,), g = state["step"].item(), gradient.indices(), gradient.values()
        v = beta2 ** (t - state["last_step"][ids]) * state["exp_avg_sq"][ids] + (1 - beta2) * g**2
        state["exp_avg_sq"][ids], state["last_step"][ids] = v, t
        rate = group["lr"] * (1 - beta1) / (1 - beta1 / beta2**0.5)
        table[ids] -= rate * g / ((v / (1 - beta2**t)).sqrt() + group["eps"])
