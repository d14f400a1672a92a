"""What training minimises, beside regularizers: the task's loss, the distance from a teacher, or both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from qcompress.errors import ConfigError

Loss = Callable[[Any, Any], Tensor]


def distillation(outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
    """Returns the KL divergence of softmax outputs from a teacher's, averaged over the batch.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015: logits are divided by T, and the loss
    is multiplied by T², so that gradients keep their size.

    Args:
        outputs: logits [batch, classes], or what `first` takes them from.
        wanted: the teacher's logits [batch, classes].
        temperature: T > 0.

    >>> distillation(torch.zeros(2, 3), torch.zeros(2, 3)).item()
    0.0
    """
    mine, theirs = (first(value) / temperature for value in (outputs, wanted))
    found = functional.kl_div(mine.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    return found * temperature**2


def cross_entropy(outputs: Any, target: Any) -> Tensor:
    """Returns the cross entropy of the first output, and classes [batch] or their probabilities [batch, classes]."""
    return functional.cross_entropy(first(outputs), target)


def squared_error(outputs: Any, target: Any) -> Tensor:
    """Returns the mean squared error of the first output, from numbers in its shape."""
    found = first(outputs)
    return functional.mse_loss(found, target.to(found.dtype).view_as(found))


def first(outputs: Any) -> Tensor:
    """Returns the first tensor of a model's outputs, in float32 at least.

    >>> first((torch.ones(1), torch.zeros(1))), first({"logits": torch.ones(1)})
    (tensor([1.]), tensor([1.]))
    """
    leaf = next((leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
    if leaf is None:
        raise ConfigError("The model must return a tensor, or a structure of tensors; pass a loss that fits it.")
    return leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf


@final
@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of one batch.

    Args:
        task: (outputs, target) -> 0-d.
        distance: (outputs, teacher's outputs) -> 0-d.
        kd_weight: weight of the distance where there is a teacher; the task's loss gets the rest.
    """

    task: Loss
    distance: Loss = distillation
    kd_weight: float = 1.0

    def __call__(self, outputs: Any, target: Any, taught: Any = None) -> Tensor:
        """Returns the loss, 0-d.

        Args:
            outputs: the model's.
            target: of the batch; not used where the teacher has all the weight.
            taught: the teacher's outputs; None: there is no teacher.
        """
        if taught is None:
            return self.task(outputs, target)
        if self.kd_weight == 1:
            return self.distance(outputs, taught)
        return (1 - self.kd_weight) * self.task(outputs, target) + self.kd_weight * self.distance(outputs, taught)
