"""Training with quantizers: attach them to a model, train it in any loop, finalize it to a compressed model."""

from qcompress.finetune.attach import prepare
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.loop import train
from qcompress.finetune.losses import distillation
from qcompress.finetune.methods import Methods
from qcompress.finetune.prepared import Inputs, Prepared
from qcompress.finetune.trainer import StepRecord

__all__ = ["Inputs", "LoopConfig", "Methods", "Prepared", "StepRecord", "distillation", "prepare", "train"]
