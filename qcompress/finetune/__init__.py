"""Training with quantizers: attach them to a model, train it in any loop, finalize it to a compressed model."""

from qcompress.finetune.attach import prepare
from qcompress.finetune.loop import LoopConfig, StepRecord, distillation, train
from qcompress.finetune.methods import Methods
from qcompress.finetune.prepared import Inputs, Prepared

__all__ = ["Inputs", "LoopConfig", "Methods", "Prepared", "StepRecord", "distillation", "prepare", "train"]
