"""`model_type: "effattn"`: a checkpoint whose weights are not what its plain class expects.

Its config.json says the model's own type under "effattn"; what comes out here is that
configuration, so that every Auto class finds the model's own class."""

from __future__ import annotations

from transformers.configuration_utils import PreTrainedConfig

from effattn.hf.names import METHOD
from effattn.hf.names import NAME as KEY


class EffattnConfig(PreTrainedConfig):
    """Stands for the configuration inside; there are no instances of it."""

    model_type = KEY

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """The configuration of the model inside. ValueError for a record that no save writes."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from effattn.hf.trusted import check_config

        check_config(config_dict)
        kind = config_dict[KEY]["model_type"]
        # checkpoints of earlier versions name no method
        plain = {"quantization_config": dict(METHOD)} | config_dict | {"model_type": kind}
        return CONFIG_MAPPING[kind].from_dict(plain, **kwargs)


def register() -> None:
    """Makes the type known to AutoConfig."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING.register(KEY, EffattnConfig, exist_ok=True)
