"""What the quantization method is called, as transformers reads it from config.json."""

from __future__ import annotations

from transformers.utils.quantization_config import QuantizationConfigMixin

from effattn.hf.names import NAME as KEY


class EffattnQuantizationConfig(QuantizationConfigMixin):
    """What config.json says: that the entry "effattn" is to be restored."""

    def __init__(self, quant_method: str = KEY, **kwargs):
        self.quant_method = KEY
        # transformers forgets the method once the model is loaded, as it does after dequantizing
        self.dequantize = True
