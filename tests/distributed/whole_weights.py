from hf_continual.distributed import WHOLE_WEIGHTS
from hf_continual.methods.base import ContinualMethod


class NeedsWholeWeights(ContinualMethod):
    """A method of one's own that cannot do without them; those of the package all can."""

    supports = WHOLE_WEIGHTS
    unsupported = dict.fromkeys(("fsdp2", "zero3"), "it reads every weight")
