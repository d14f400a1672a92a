"""L2 and KL: penalties that pull weights towards their quantized values.

Source: Han et al., ICCV 2021 ("bin regularization"), Table 4.
Code: written from the paper; no code copied.
Deviations: the paper names the terms without formulas; these are mean((w - w_hat)²) and KL(softmax(w) ‖ softmax(w_hat))
over all elements. w_hat gets no gradient.
"""

from torch import Tensor


def l2(w: Tensor, w_hat: Tensor) -> Tensor:
    """Returns mean((w - w_hat)²).

    Args:
        w: any shape, not empty.
        w_hat: the quantized weight, in the shape of w; gets no gradient.

    Returns:
        0-d.

    >>> import torch
    >>> l2(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
    2.0
    """
    return (w - w_hat.detach()).square().mean()


def kl(w: Tensor, w_hat: Tensor) -> Tensor:
    """Returns KL(softmax(w) ‖ softmax(w_hat)) over all elements.

    Args:
        w: any shape, not empty.
        w_hat: the quantized weight, in the shape of w; gets no gradient.

    Returns:
        0-d.

    >>> import torch
    >>> kl(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).item()
    0.0
    """
    log_p = w.reshape(-1).log_softmax(0)
    log_q = w_hat.detach().reshape(-1).log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum()
