"""fastflow: the flow-matching module of CosyVoice 1, 2 and 3 on fused kernels that run forward and backward."""

from fastflow.backend import use_backend

__version__ = "0.1.0"

__all__ = ["use_backend"]
