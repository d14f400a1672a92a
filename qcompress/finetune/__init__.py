"""Training with the quantizers of the papers: attach them, train in any loop, finalize."""

from qcompress.finetune.attach import Inputs, Prepared, prepare
from qcompress.finetune.loop import LoopConfig, StepRecord, distillation, train
from qcompress.finetune.methods import Methods

__all__ = ["Inputs", "LoopConfig", "Methods", "Prepared", "StepRecord", "distillation", "prepare", "train"]
