r"""DER++: train on stored rows of earlier tasks too, and keep the logits that the model gave for them then.

    L = L_task(new) + \beta L_task(stored) + \alpha D(z, z_then)
    D = mean squared difference of logits (mse: DER++)  or  KL(softmax(z_then) || softmax(z)) (kl: SEEKR's paper)

z are the logits at the positions that predict a label; SEEKR's paper compares with beta = alpha = 1/2 and D = KL.

Source: Buzzega et al., "Dark Experience for General Continual Learning", arXiv:2004.07211, Eq. 6 (there each of the two
terms has a stored batch of its own; here both are of the same rows), and He et al., "SEEKR", arXiv:2411.06171.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..collators import TeacherBatch
from ..distillation import (
    ReplayDistillation,
    ReplayDistillationConfig,
    check_choice,
    check_weight,
    logit_kl,
    logit_mse,
    logits_at,
)


@dataclass
class DERPPConfig(ReplayDistillationConfig):
    loss: Literal["mse", "kl"] = field(
        default="mse", metadata={"help": "D: mse of logits (DER++), or kl of probabilities (as in SEEKR's paper)."}
    )
    alpha: float = field(default=0.5, metadata={"help": "Weight of D (SEEKR's comparison: 0.5)."})
    beta: float = field(default=0.5, metadata={"help": "Weight of the task loss on stored rows (DER++: 0.5)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, ("mse", "kl"))
        check_weight("alpha", self.alpha)
        check_weight("beta", self.beta)


class DERPP(ReplayDistillation[DERPPConfig]):
    """Dark experience replay. Logs `derpp/logits`, weight included.

    With `loss_mix: alternate` the two terms on stored rows come in micro-batches of their own, as in SEEKR's code; with
    `summed` beside every new micro-batch, as in DER++.
    """

    config_class = DERPPConfig
    paper = "arxiv:2004.07211"

    def __init__(self, config: DERPPConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.stored_loss_weight = self.config.beta
        self.needs_logits = bool(self.config.alpha) and self.config.loss_mix == "alternate"

    def distillation_losses(self, teacher: TeacherBatch, outputs: Any) -> dict[str, Tensor]:
        target = teacher.logits
        if not self.config.alpha or target is None:
            return {}
        student = logits_at(outputs.logits, target)
        if self.config.loss == "kl":
            distance = logit_kl(student, target.values, target.lse, target.indices)
        else:
            distance = logit_mse(student, target.values, target.indices)
        return {"derpp/logits": self.config.alpha * distance}
