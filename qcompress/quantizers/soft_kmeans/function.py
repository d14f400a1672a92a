"""Soft k-means as a function of any tensor, and the choice of its form.

Shape suffixes: V = vectors of all groups, G = groups, K = centroids, D = numbers in a vector.
"""

from typing import Final, Literal, get_args

import torch
from torch import Tensor

from qcompress.errors import ConfigError
from qcompress.palettes import vector
from qcompress.quantizers.soft_kmeans.dense import Metric
from qcompress.quantizers.soft_kmeans.forms import Exact, Form, exact_form, soft, table_for
from qcompress.quantizers.soft_kmeans.groups import Groups
from qcompress.quantizers.soft_kmeans.table import Table, is_queued

FormName = Literal["auto", "dense", "chunked", "tabulated"]

DIMS: Final = (1, *vector.DIMS)
DRIFT: Final = 2.0  # how far midpoints may move until a form is chosen again, see `table`


def dkm(
    w: Tensor,
    centroids: Tensor,
    tau: float | Tensor,
    iterations: int = 3,
    metric: Metric = "squared",
    form: FormName | Form = "auto",
    *,
    rows_per_lut: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves centroids towards weights, and weights towards centroids, both softly.

    Each iteration is differentiated: attention A = softmax(-distance / τ) of every vector of weights to the centroids
    c, then c = AᵀW / ΣA. The soft weights are A·c, with the last attention and the last centroids.

    Args:
        w: float32, float64, float16 or bfloat16, any shape; its vectors are `granularity.vectors`. Not modified.
        centroids: [K] for scalars, [K, D] for vectors of D = 2, 4 or 8 weights; [G, K] or [G, K, D] for G groups of
            output channels (axis 0), each with its own; [G, K] with K = 2, 4 or 8 needs `rows_per_lut`.
        tau: τ > 0, in units of a squared weight, or of a weight with metric="euclidean"; a float or [G].
        iterations: T, at least 1.
        metric: the distance, "squared" or "euclidean".
        form: how it is computed. "dense" keeps [V, K] tensors; "chunked" is as exact without them, and
            leaves out attention that is next to zero where that is faster; "tabulated" (D = 1,
            squared) interpolates functions of a weight, at a cost that does not depend on K and T. "auto" takes
            "tabulated" where its error bound holds. It costs time and waits for the device, so that training loops call
            `choose_form` before some steps and pass its result.
        rows_per_lut: output channels in a group; None: as many as G groups of equal size have.

    Returns:
        The soft weights, in the shape and dtype of w, and the last centroids, in the shape and dtype of `centroids`.
        Gradients reach w and `centroids` from both. A centroid with less than 1e-20 of the attention keeps its place.

    Raises:
        ConfigError: an argument is invalid, or the form cannot compute it.

    >>> w = torch.tensor([0.0, 1.0, 5.0], requires_grad=True)
    >>> weights, moved = dkm(w, torch.tensor([0.0, 4.0]), tau=0.1, iterations=2)
    >>> weights.tolist(), moved.tolist()
    ([0.5, 0.5, 5.0], [0.5, 5.0])
    """
    groups, x_VD, c_GKD, tau_G = _viewed(w, centroids, tau, iterations, metric, rows_per_lut)
    if isinstance(form, Table) and form.count != len(x_VD):
        raise ConfigError(
            f"dkm: the form was chosen for {form.count:,} weights, but w has {len(x_VD):,}; call choose_form for it."
        )
    if isinstance(form, str):
        form = _form(form, groups, x_VD, c_GKD, tau_G, iterations, metric)
    out_VD, moved_GKD = soft(x_VD, c_GKD, tau_G, groups.lengths, iterations, metric, form)
    return groups.join(out_VD), moved_GKD.reshape(centroids.shape)


@torch.no_grad()
def choose_form(
    w: Tensor,
    centroids: Tensor,
    tau: float | Tensor,
    iterations: int = 3,
    metric: Metric = "squared",
    *,
    rows_per_lut: int | None = None,
    drift: float = DRIFT,
) -> Form:
    """Returns the fastest form for some weights and centroids, and for those that training makes of them soon.

    It waits for the device; steps that use its result do not.

    Args:
        w: as in `dkm`, and so are all others but `drift`.
        centroids: as in `dkm`.
        tau: τ.
        iterations: T.
        metric: the distance.
        rows_per_lut: output channels in a group.
        drift: how far midpoints between neighbouring centroids may move until the form is chosen again, in units of τ
            over the distance of the two.

    Raises:
        ConfigError: an argument is invalid.

    >>> w = torch.linspace(-1, 1, 20_000)
    >>> form = choose_form(w, torch.tensor([-0.5, 0.5]), tau=0.01)
    >>> type(form).__name__, dkm(w, torch.tensor([-0.5, 0.5]), 0.01, form=form)[0].shape
    ('Table', torch.Size([20000]))
    """
    groups, x_VD, c_GKD, tau_G = _viewed(w, centroids, tau, iterations, metric, rows_per_lut)
    return _form("auto", groups, x_VD, c_GKD, tau_G, iterations, metric, drift)


def _viewed(
    w: Tensor, centroids: Tensor, tau: float | Tensor, iterations: int, metric: Metric, rows_per_lut: int | None
) -> tuple[Groups, Tensor, Tensor, Tensor]:
    """Returns the groups of w, its vectors, the centroids [G, K, D] and τ [G]."""
    if metric not in get_args(Metric):
        raise ConfigError(f"dkm: metric must be one of {', '.join(get_args(Metric))}, got {metric!r}.")
    if iterations < 1:
        raise ConfigError(f"dkm: iterations must be at least 1, got {iterations!r}.")
    if not w.is_floating_point() or not centroids.is_floating_point():
        raise ConfigError(f"dkm: w and centroids must hold floats, got {w.dtype} and {centroids.dtype}.")
    if not w.numel() or not centroids.numel() or not 1 <= centroids.ndim <= 3:
        raise ConfigError(
            "dkm: w must not be empty, and centroids must be [K], [K, D], [G, K] or [G, K, D]; got shapes "
            f"{list(w.shape)} and {list(centroids.shape)}."
        )
    c_GKD, grouped = centroids, centroids.ndim == 3 or rows_per_lut is not None
    if centroids.ndim == 1:
        c_GKD = centroids[None, :, None]
    elif centroids.ndim == 2:
        grouped |= centroids.shape[1] not in DIMS
        c_GKD = centroids[..., None] if grouped else centroids[None]
    if c_GKD.shape[2] not in DIMS:
        raise ConfigError(f"dkm: vectors of 1, 2, 4 or 8 weights are supported, got {c_GKD.shape[2]}.")
    if grouped and rows_per_lut is None and w.ndim:
        rows_per_lut = -(-w.shape[0] // len(c_GKD))
    groups = Groups.of(w.shape, rows_per_lut, c_GKD.shape[2])
    if len(groups.lengths) != len(c_GKD):
        raise ConfigError(
            f"dkm: w of shape {list(w.shape)} has {len(groups.lengths)} groups of {rows_per_lut} output channels, but "
            f"there are centroids for {len(c_GKD)}."
        )
    tau_G = torch.as_tensor(tau, dtype=torch.float64, device=w.device)
    if tau_G.shape not in ((), (1,), (len(c_GKD),)):
        raise ConfigError(f"dkm: tau must be one number, or one for each of {len(c_GKD)} groups; got {len(tau_G)}.")
    if not is_queued(w.device) and not (tau_G > 0).all():
        raise ConfigError(f"dkm: tau must be positive, got {tau!r}.")
    return groups, groups.split(w), c_GKD, tau_G.expand(len(c_GKD))


def _form(
    name: str,
    groups: Groups,
    x_VD: Tensor,
    c_GKD: Tensor,
    tau_G: Tensor,
    iterations: int,
    metric: Metric,
    drift: float = 0.0,
) -> Form:
    if name not in get_args(FormName):
        raise ConfigError(f"dkm: form must be one of {', '.join(get_args(FormName))}, got {name!r}.")
    if name == "dense":
        return Exact("dense")
    found = None
    if name in ("auto", "tabulated") and metric == "squared":
        found = table_for(x_VD.detach(), c_GKD.detach(), tau_G, groups.lengths, iterations, drift)
    if found is None and name == "tabulated":
        raise ConfigError(
            'dkm: form="tabulated" needs scalar centroids, metric="squared", weights other than float64, and a tau for '
            'which 65536 bins are enough; use form="auto".'
        )
    if found is not None:
        return found
    exact = exact_form(x_VD.detach(), c_GKD.detach(), tau_G, groups.lengths, metric)
    return Exact("near" if exact.kind == "near" else "chunked", exact.dtype) if name == "chunked" else exact
