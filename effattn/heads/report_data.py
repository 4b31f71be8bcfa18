"""What a conversion report is made from, by name: tables, plots and the page read it by this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from effattn.reports.common import DecodeRow, Quality
from effattn.reports.document import Document
from effattn.reports.tables import number


class LayerErrors(TypedDict, total=False):
    """Squared norm of what is amiss over the squared norm of what is wanted: of keys and values the
    parent's; of attention and the FFN what the parent's give, and where that is added to the hidden
    states as it is, with what these lack of the parent's."""

    layer: int
    k_error: float
    v_error: float
    attention_error_merged: float  # before the output projection was solved again
    attention_error: float
    ffn_error: float  # after its output projection was solved again; absent where it was not


class CurvePoint(Quality):
    """A model while uptraining."""

    tokens: int  # seen so far


@dataclass
class ConversionData(Document):
    """Wraps `data`, a dict of kind "convert_gqa"; any of its measurements may be None or absent.

    Keys: settings, model, quality (perplexity; cross_entropy and kl in nats a token), uptraining,
    layers (relative squared errors), kv_bytes_per_token, decode (milliseconds a step, tokens/s,
    bytes), verification, environment."""

    data: dict
    kind = "convert_gqa"
    named = "a conversion report"
    plain: ClassVar[bool] = True  # what was saved is proven to need nothing of effattn

    @property
    def settings(self) -> dict:
        """What was asked for; {} if the file has none."""
        return self.part("settings")

    @property
    def model(self) -> dict:
        """Facts of the model; {} if the file has none."""
        return self.part("model")

    @property
    def quality(self) -> dict:
        """Perplexity and KL by stage; {} if nothing was measured."""
        return self.part("quality")

    @property
    def uptraining(self) -> dict:
        """What training said; {} without one."""
        return self.part("uptraining")

    @property
    def verification(self) -> dict:
        """How the saved model was loaded again; {} if it was not."""
        return self.part("verification")

    @property
    def kv_bytes_per_token(self) -> dict:
        """Bytes before and after, over all layers whose caches grow."""
        return self.part("kv_bytes_per_token")

    @property
    def layers(self) -> list[LayerErrors]:
        """A row for each layer: errors of its new heads."""
        return self.data.get("layers") or []

    @property
    def decode(self) -> list[DecodeRow]:
        """Decoding times before and after, a row for each batch."""
        return self.data.get("decode") or []

    @property
    def curve(self) -> list[CurvePoint]:
        """Perplexity while it was trained."""
        return self.uptraining.get("curve") or []

    @property
    def kv_ratio(self) -> float | None:
        """How many times smaller the KV cache of a token is: by its heads where all caches are
        rings, which do not grow."""
        before, after = self.kv_bytes_per_token.get("before"), self.kv_bytes_per_token.get("after")
        if before == after == 0:
            before, after = (self.model.get(f"kv_heads_{when}") for when in ("before", "after"))
        return before / after if before and after else None

    def measured(self, stage: str, name: str = "perplexity") -> float | None:
        """`name` ("perplexity", "cross_entropy", "kl") at a stage ("before", "converted",
        "uptrained"), or None.
        """
        return (self.quality.get(stage) or {}).get(name)

    def excess(self, stage: str) -> float | None:
        """Cross-entropy above the parent's, nats a token."""
        before, after = (
            self.measured("before", "cross_entropy"),
            self.measured(stage, "cross_entropy"),
        )
        return None if before is None or after is None else after - before

    @property
    def curve_parent(self) -> float | None:
        """The parent's perplexity on the tokens the curve was measured on; None if these are other
        tokens.

        `uptraining["parent"]` has it, or the curve starts where `quality["converted"]` is: then
        they are the same."""
        own = (self.uptraining.get("parent") or {}).get("perplexity")
        converted = self.measured("converted")
        if own is not None or not self.curve or not converted:
            return own
        start = self.curve[0].get("perplexity")
        same = start is not None and math.isclose(start, converted, rel_tol=1e-3)
        return self.measured("before") if same else None

    @property
    def heads_text(self) -> str:
        """The numbers of KV heads, "8 -> 2"."""
        return " -> ".join(
            number(self.model.get(f"kv_heads_{when}")) for when in ("before", "after")
        )
