"""LoRA and QLoRA as a pure transform of the parameter pytree."""

from jlora.core.lift import lift as lift
from jlora.core.lora import LoraArray as LoraArray
from jlora.core.lora import LoraSpec as LoraSpec
from jlora.core.partition import combine as combine
from jlora.core.partition import labels as labels
from jlora.core.partition import merge as merge
from jlora.core.partition import partition as partition
from jlora.core.quantized import QuantizedArray as QuantizedArray
from jlora.core.quantized import QuantSpec as QuantSpec
from jlora.core.quantized import dequantize as dequantize
from jlora.core.quantized import quantize as quantize
from jlora.core.state import TrainState as TrainState
from jlora.version import __version__ as __version__
