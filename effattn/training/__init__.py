"""What flows that train share: lending a model to the Trainer, distillation, transfer, LoRA."""

from effattn.training.lending import lent

__all__ = ["lent"]
