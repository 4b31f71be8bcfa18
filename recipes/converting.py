"""What the conversions of heads have in common: settings, and their steps but for the conversion
itself.

refit: bool = converting.refits()             # a setting, in its place among a recipe's own
parent, tokenizer, parts = converting.load(settings, show, lambda parts: ...)
going = converting.begin(settings, show, parent, tokenizer, parts, "convert-gqa")
student, report = ...                        # what a recipe is about
converting.measure(going, student, report)   # and uptraining, and decoding steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effattn.recipes import flow, options
from effattn.recipes.options import option, real, tokens, whole
from effattn.resuming import Parts
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.hf.anatomy import Anatomy
    from effattn.textdata import Streams


# Settings, with the same words and defaults everywhere
# -------------------------------------------------------------------------------------------------


def refits():
    """Whether outputs are fitted again."""
    return option(True, "solve the output projections again by least squares")


def text_files():
    """Files to convert on."""
    return options.text_files("to calibrate on")


def calibration_tokens():
    """How many of their tokens."""
    return tokens(50_000, "to take second moments of", least=1)


def evaluation_tokens():
    """Tokens that nothing is fitted to."""
    return tokens(32_768, "held out, to measure on", least=2)


def uptrain_tokens():
    """Tokens of the distillation."""
    return tokens(0, "to distil on after converting; 0: none")


def window_length():
    """Tokens of a window, in everything that a conversion reads."""
    return whole(512, "window length in tokens", least=8, unit="tokens")


def uptrain_batch():
    """Windows of a step of the distillation."""
    return whole(2, "uptraining windows a step and process", least=1)


def ce_weight():
    """Of the text's own next tokens."""
    return real(0.05, "weight of cross-entropy beside the KL", least=0)


def layer_weight():
    """Of what single layers give."""
    return real(30.0, "weight of the distance to the parent's layer outputs", least=0)


def trainable():
    """The weights that the distillation changes."""
    return option("attention", "what uptraining trains: attention, or all")


def decode_contexts():
    """Caches that steps are timed over."""
    return options.decode_contexts((512, 4096, 16384))


# Steps
# -------------------------------------------------------------------------------------------------


@dataclass
class Going:
    """A conversion under way. settings: a recipe's; length: tokens of a window; kept: what has been
    measured, None in all processes but the main one; quality: the report's."""

    settings: Any
    show: Quiet
    parent: Any
    text: Streams
    length: int
    kept: Parts | None
    quality: dict

    def part(self, said: str, name: str, run: Callable, *given) -> Any:
        """What `run` gives, unless an unfinished run has it already."""
        return flow.part(self.show, self.kept, said, name, run, *given)

    @property
    def calibration(self):
        """Tokens to convert on, (N,) int64."""
        return self.text.train[: self.settings.calibration_tokens]


def check(settings) -> None:
    """What can be known to be wrong before a model is loaded, of what they have in common. Raises
    ValueError."""
    from effattn.errors import check_choice
    from effattn.outputs import check_new_folder
    from effattn.training.lending import TRAINABLE

    if hasattr(settings, "trainable"):
        check_choice("trainable", settings.trainable, TRAINABLE)
    flow.device(settings.device)
    check_new_folder("output", settings.output)
    flow.check_unfinished(settings, begin=False)


def load(settings, show: Quiet, fits: Callable[[Anatomy], object]) -> tuple:
    """The parent on its device, its tokenizer, and its anatomy. fits: raises what the model cannot
    have."""
    from effattn.hf import anatomy
    from effattn.hf.weights import weight_bytes
    from effattn.outputs import check_room
    from effattn.surgery.checkpoint import load_model

    with show.stage("loading the model"):
        parent, tokenizer = load_model(settings.model, bos=settings.bos)
        parent.to(flow.device(settings.device))
        parts = anatomy.of(parent)
        fits(parts)
        # no more than half of the weights is keys and values
        check_room("output", settings.output, weight_bytes(parent) // 2)
    return parent, tokenizer, parts


def begin(settings, show: Quiet, parent, tokenizer, parts: Anatomy, name: str) -> Going:
    """Reads the text, goes on from an earlier run, and measures the parent. name: of the flow."""
    from effattn.evaluate.loss import measure_parent

    text, length = _read(settings, show, tokenizer, parts)
    flow.check_unfinished(settings, begin=True)
    going = Going(settings, show, parent, text, length, None, {})
    if main_process():
        made_with = flow.made_with(parent, "torch", "transformers")
        going.kept = Parts(settings.partial / "parts.json", settings.kept(), made_with, name)
        said = "measuring the parent"
        going.quality = going.part(said, "parent", measure_parent, parent, text, length)
    return going


def measure(going: Going, student, report) -> None:
    """Measures the conversion, distils into it where that was asked for, measures again, and times
    decoding; all of it goes into `report`."""
    from effattn.evaluate.loss import compare

    settings, main, data = going.settings, main_process(), report.data
    compared = (compare, going.parent, student, going.text.evaluation, going.length)
    if main:
        said = "measuring the conversion"
        going.quality["converted"] = going.part(said, "converted", *compared)
    data["quality"] = going.quality or None  # and what is measured from here on
    data["settings"] |= _asked_for(settings, going.text) | flow.fed(going.text, going.parent)

    # The parent teaches what the conversion has lost.
    if getattr(settings, "uptrain_tokens", 0):
        data["uptraining"] = _distil(going, student)
        if main:
            said = "measuring the uptrained model"
            going.quality["uptrained"] = going.part(said, "uptrained", *compared)
    if main and settings.decode_contexts:
        data["decode"] = _decode_speed(going, student)


def _read(settings, show: Quiet, tokenizer, parts: Anatomy) -> tuple[Streams, int]:
    """The text to calibrate, train and measure on, and the tokens of a window of it."""
    from effattn.calibration.tokens import check_calibration
    from effattn.textdata import streams

    uptrain = getattr(settings, "uptrain_tokens", 0)
    with show.stage("reading text"):
        text = streams(
            tokenizer,
            train=max(settings.calibration_tokens, uptrain),
            evaluation=settings.evaluation_tokens,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )
        calibration = text.train[: settings.calibration_tokens]
        length = check_calibration(calibration, parts, settings.length)
        if uptrain:
            text.check_passes("uptrain_tokens", uptrain)
    return text, length


def _distil(going: Going, student) -> dict[str, object]:
    """Trains `student` towards the parent, from the last checkpoint of an unfinished run if there
    is one."""
    from effattn import embedded
    from effattn.training.uptrain import uptrain

    settings, text = going.settings, going.text
    with going.show.stage(f"uptraining on {settings.uptrain_tokens:,} tokens") as progress:
        result = uptrain(
            student,
            going.parent,
            text.train,
            train_tokens=settings.uptrain_tokens,
            folder=settings.partial / "uptrain",
            evaluation=text.evaluation[:8_192],
            length=going.length,
            batch=settings.batch,
            lr=settings.lr,
            ce_weight=settings.ce_weight,
            layer_weight=settings.layer_weight,
            trainable=settings.trainable,
            seed=settings.seed,
            progress=progress,
            overrides={"use_cpu": student.device.type == "cpu"} | settings.overrides,
        )
    pretraining = embedded.card()["train_tokens"] if settings.model == embedded.NAME else None
    result["share_of_pretraining"] = result["tokens"] / pretraining if pretraining else None
    return result


def _decode_speed(going: Going, student) -> list[dict]:
    """Both models' decoding steps at each context."""
    from effattn.profiling.decode import decode_by_context

    contexts, models = going.settings.decode_contexts, {"before": going.parent, "after": student}
    name = f"decode/{','.join(map(str, contexts))}"  # other contexts may go on from this run
    return going.part("timing decode steps", name, decode_by_context, models, contexts)


def _asked_for(settings, text: Streams) -> dict[str, object]:
    """What the report says of the settings beside those of the conversion itself."""
    named = ("uptrain_tokens", "ce_weight", "layer_weight", "trainable")
    found = {name: getattr(settings, name) for name in named if hasattr(settings, name)}
    if hasattr(settings, "uptrain_tokens"):
        found["uptrain_batch"] = settings.batch
    return {"model": settings.model, "calibration_source": text.source} | found
