"""Takes 20 steps in as many processes as the launcher started: python shared_steps.py METHOD FILE."""

import sys

import torch
from torch import nn

import qcompress as qc
from qcompress.finetune import LoopConfig, Methods, prepare
from qcompress.finetune.losses import Objective, cross_entropy
from qcompress.finetune.processes import Processes
from qcompress.finetune.trainer import Trainer
from qcompress.plan.settings import Settings

PLANS = {
    "float": qc.Plan(default=Settings(skip=True)),
    "lsq": qc.Plan.from_flags(bits=8),
    "dkm": qc.Plan.from_flags(bits=2),
}


def main(method: str, file: str) -> None:
    """Train, and let the first process save all tensors and the gradients of the first step."""
    processes = Processes.launched("cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    x, y = torch.randn(320, 3, 8, 8), torch.randint(0, 10, (320,))
    methods = Methods(weights="dkm" if method == "dkm" else "lsq")
    tuned = prepare(net.eval(), PLANS[method], example_inputs=(x[:16],), methods=methods)
    if method != "dkm":
        tuned, x = tuned.double(), x.double()
    trainer = Trainer(
        tuned,
        LoopConfig(epochs=1),
        20,
        Objective(cross_entropy),
        forward=lambda model, inputs: model(inputs),
        average=processes.average,
    )
    share = 16 // processes.size
    gradients = {}
    for step in range(20):
        mine = slice(16 * step + share * processes.rank, 16 * step + share * (processes.rank + 1))
        trainer.take(x[mine], y[mine])
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}
    if processes.is_first:
        tensors = {name: value for name, value in tuned.state_dict().items() if isinstance(value, torch.Tensor)}
        torch.save((tensors, gradients), file)
    processes.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
