"""fastflow: the flow-matching module of CosyVoice 1, 2 and 3 on fused kernels that run forward and backward."""

from fastflow.accelerate import accelerate
from fastflow.backend import use_backend
from fastflow.config import from_preset, load
from fastflow.dit import DiT
from fastflow.encoder import ConformerEncoder, PreLookaheadLayer, UpsampleConformerEncoder
from fastflow.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec, MaskedDiffWithXvec
from fastflow.flow_matching import CausalConditionalCFM, ConditionalCFM
from fastflow.length_regulator import InterpolateRegulator
from fastflow.unet import CausalConditionalDecoder, ConditionalDecoder

__version__ = "0.1.0"

__all__ = [
    "CausalConditionalCFM",
    "CausalConditionalDecoder",
    "CausalMaskedDiffWithDiT",
    "CausalMaskedDiffWithXvec",
    "ConditionalCFM",
    "ConditionalDecoder",
    "ConformerEncoder",
    "DiT",
    "InterpolateRegulator",
    "MaskedDiffWithXvec",
    "PreLookaheadLayer",
    "UpsampleConformerEncoder",
    "accelerate",
    "from_preset",
    "load",
    "use_backend",
]
