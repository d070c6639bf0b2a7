"""Models of Hugging Face transformers: BitNet on these kernels, and deployed models on disk.

:func:`convert` replaces the BitNet layers of a loaded model by deployed BitLinear layers, and
:func:`fuse` computes the products of known decoder layers together with what stands around them.

``from_pretrained`` loads a model with deployed layers that ``save_pretrained`` wrote, by a
quantisation method of the name ``"bitlinear"``: a model from :func:`convert`, or any other model
after ``bitlinear.convert`` and ``bitlinear.deploy``, which calls :func:`attach`.

``import bitlinear`` loads this package as soon as transformers has loaded its quantisers. If
bitlinear is not imported, transformers warns of an "unknown quantization type" and initialises the
weights at random.

The numbers differ because transformers computes in the dtype of the model. In bf16 it rounds the
scales, the scaled activations, the product and the result, each to 8 bits; here the product is
exact and only the result is rounded. In fp32 both agree to rounding, unless a scaled activation is
a tie to within an ulp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.24"):  # The argument of caches has another name.
    raise ImportError(
        f"bitlinear needs transformers 5.24 or later, but this is {transformers.__version__}: "
        f"upgrade it with pip install -U transformers"
    )

# This package is loaded together with transformers.quantizers.auto. Other modules of transformers
# may not be loaded yet, or take long to load, so only functions import them.

from ...conversion.repacking import repack
from .bitnet import convert
from .config import BitLinearConfig
from .fusion import fuse, unfuse
from .head import quantize_head
from .layers import NormedBitLinear
from .quantizer import BitLinearQuantizer, attach

if TYPE_CHECKING:
    from .captured import generate
    from .decoding import speed_up_decoding

__all__ = [
    "BitLinearConfig",
    "BitLinearQuantizer",
    "NormedBitLinear",
    "attach",
    "convert",
    "fuse",
    "generate",
    "quantize_head",
    "repack",
    "speed_up_decoding",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    """Import what needs more of transformers when it is needed."""
    if name == "generate":
        from .captured import generate

        return generate
    if name == "speed_up_decoding":
        from .decoding import speed_up_decoding

        return speed_up_decoding
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Do nothing: the import of this package registers its classes with transformers."""
