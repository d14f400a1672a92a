"""Compares a function of tensors with a slow reference that returns output and gradients."""

import numpy as np
import torch


def agree(function, answer, tensors, *constants):
    """Checks output and gradients in float64 to 1e-6, and that inputs are not modified.

    Args:
        function: takes the tensors and the constants; returns a tensor.
        answer: the reference; takes the same arguments as arrays, and the gradient of the output; returns the output
            and the gradients by name.
        tensors: the arguments that get gradients, arrays by name.
        constants: the other arguments.
    """
    arrays = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in arrays.items()}
    out = function(*leaves.values(), *constants)
    assert out.dtype == torch.float64
    g = np.asarray(np.random.default_rng(0).normal(size=tuple(out.shape)))
    wanted, gradients = answer(*arrays.values(), *constants, g)
    np.testing.assert_allclose(out.detach().numpy(), wanted, rtol=1e-6, atol=1e-12)
    got = torch.autograd.grad(out, list(leaves.values()), torch.tensor(g), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), got, strict=True):
        found = np.zeros(leaf.shape) if gradient is None else gradient.numpy()
        assert found.shape == tuple(leaf.shape)
        size = 1 + np.abs(gradients[name]).max(initial=0)
        np.testing.assert_allclose(found, gradients[name], rtol=1e-6, atol=1e-12 * size, err_msg=name)
        np.testing.assert_array_equal(leaf.detach().numpy(), arrays[name])
