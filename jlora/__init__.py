"""LoRA and QLoRA as a pure transform of the parameter pytree."""

from jlora.core.arithmetic import add_adapters as add_adapters
from jlora.core.combination import combine as combine
from jlora.core.combination import labels as labels
from jlora.core.combination import merge as merge
from jlora.core.description import describe as describe
from jlora.core.lazy import LoraArray as LoraArray
from jlora.core.lift import lift as lift
from jlora.core.lora import LoraSpec as LoraSpec
from jlora.core.partition import partition as partition
from jlora.core.quantization import QuantSpec as QuantSpec
from jlora.core.quantization import quantize as quantize
from jlora.core.quantized import QuantizedArray as QuantizedArray
from jlora.core.quantized import dequantize as dequantize
from jlora.core.state import TrainState as TrainState
from jlora.core.usage import infer_axes as infer_axes
from jlora.version import __version__ as __version__
