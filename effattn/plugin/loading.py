"""`quant_method: "effattn"`: plain `from_pretrained` restores what `effattn.save` wrote.

The quantizer gives the new, empty model its modules before the weights are read, and hangs pattern,
positions and cache on it after; the parts are those of `effattn.load`. Nothing of it stays: the
model that comes out is a swapped model like any other."""

from __future__ import annotations

from pathlib import Path

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from effattn.hf.names import NAME as KEY
from effattn.plugin.method import EffattnQuantizationConfig


class EffattnQuantizer(HfQuantizer):
    """Restores a swapped model while transformers loads it."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        # also where the method was an argument: nothing is packed while loading, and none of it
        # stays on the model
        self.pre_quantized = True

    def update_attn_implementation(self, config):
        """The configuration of the plain model that is built first. ValueError for a record that
        no save writes."""
        from effattn.hf import uneven
        from effattn.surgery import restoring

        self.record = restoring.take(config, checked=False)
        self.layers = uneven.taken(config)
        if config._attn_implementation == KEY:  # a mark for transformers without effattn
            config._attn_implementation = None
        return config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        from effattn.hf import uneven
        from effattn.surgery import restoring

        self.files = checkpoint_files
        uneven.rebuild(model, self.layers)
        restoring.shape(self.record, model)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        from effattn.surgery import restoring

        return restoring.finish(self.record, model, self._folder(model))

    def _folder(self, model) -> str | None:
        """Where the checkpoint's files are; what a swap learned, transformers has not fetched."""
        if not self.files:
            return None
        folder, name = Path(self.files[0]).parent, model.config.name_or_path
        if self.record and not Path(name).is_dir():
            from transformers.utils import cached_file

            from effattn.surgery.record import LEARNED

            revision = getattr(model.config, "_commit_hash", None)
            cached_file(
                name, LEARNED, revision=revision, _raise_exceptions_for_missing_entries=False
            )
        return str(folder)

    def is_serializable(self) -> bool:
        """Whether transformers may save the model: it is a model like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it may be trained."""
        return True


def register() -> None:
    """Makes the method and the attention's names known to transformers."""
    from effattn.plugin import names

    if KEY not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(KEY)(EffattnQuantizationConfig)
        auto.register_quantizer(KEY)(EffattnQuantizer)
    names.register()
