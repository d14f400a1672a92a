"""A function of tensors against a slow reference that returns output and gradients."""

import numpy as np
import torch


def agree(function, answer, tensors, *settings):
    """Output and gradients in float64, to 1e-6; inputs stay as they were.

    Args:
        function: of tensors and settings.
        answer: the same of arrays, settings and the gradient by the output, if that has elements; returns output and
            gradients by name.
        tensors: arguments by name, arrays.
        settings: the other arguments.
    """
    arrays = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in arrays.items()}
    out = function(*leaves.values(), *settings)
    assert out.dtype == torch.float64
    g = np.asarray(np.random.default_rng(0).normal(size=tuple(out.shape)))
    wanted, gradients = answer(*arrays.values(), *settings, g)
    np.testing.assert_allclose(out.detach().numpy(), wanted, rtol=1e-6, atol=1e-12)
    got = torch.autograd.grad(out, list(leaves.values()), torch.tensor(g), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), got, strict=True):
        found = np.zeros(leaf.shape) if gradient is None else gradient.numpy()
        assert found.shape == tuple(leaf.shape)
        size = 1 + np.abs(gradients[name]).max(initial=0)
        np.testing.assert_allclose(found, gradients[name], rtol=1e-6, atol=1e-12 * size, err_msg=name)
        np.testing.assert_array_equal(leaf.detach().numpy(), arrays[name])
