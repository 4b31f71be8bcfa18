"""The generated tasks for lm-evaluation-harness, for those who have it (`pip install
'effattn[eval]'`).

    tasks = effattn.evaluate.harness_tasks(tokenizer, ["passkey", "line_retrieval"], length=4096)
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    lm_eval.simple_evaluate(model=lm, tasks=list(tasks.values()))

The prompts are those of `effattn.evaluate`, as text; BOS is lm_eval's business
(`HFLM(add_bos_token=...)`). Where a task offers choices it is
"multiple_choice" (metric acc), elsewhere "loglikelihood" (acc: every token of the answer is the
most likely one; perplexity)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from effattn.errors import Unsupported, check_choice
from effattn.evaluate import retrieval
from effattn.evaluate.lines import line_prompts
from effattn.evaluate.list_operations import listops_prompts
from effattn.evaluate.passkey_retrieval import passkey_prompts
from effattn.evaluate.recall import recall_prompts
from effattn.evaluate.topics import topic_prompts
from effattn.evaluate.tracking import tracking_prompts

OURS = "effattn_"  # before the names of our tasks there
NESTING = (1, 2, 3)
_Make = Callable[[float], retrieval.Prompts]
TASKS: dict[str, Callable[..., tuple[Sequence[float], _Make]]] = {}


def _task(function):
    TASKS[function.__name__.strip("_")] = function
    return function


@_task
def _passkey(tokenizer, length, depths, trials, seed):
    made = passkey_prompts(
        tokenizer, length, depths, trials=trials, digits=5, style="text", seed=seed
    )
    return depths, made


@_task
def _associative_recall(tokenizer, length, depths, trials, seed):
    return depths, recall_prompts(
        tokenizer, length, depths, pairs=8, queries=1, trials=trials, seed=seed
    )


@_task
def _line_retrieval(tokenizer, length, depths, trials, seed):
    return depths, line_prompts(
        tokenizer, length, depths, trials=trials, digits=5, style="text", seed=seed
    )


@_task
def _variable_tracking(tokenizer, length, depths, trials, seed):
    made = tracking_prompts(
        tokenizer,
        length,
        depths,
        hops=4,
        chains=1,
        letters=5,
        trials=trials,
        style="text",
        seed=seed,
    )
    return depths, made


@_task
def _topic_retrieval(tokenizer, length, depths, trials, seed):
    return depths, topic_prompts(tokenizer, length, depths, topics=5, trials=trials, seed=seed)


@_task
def _listops(tokenizer, length, depths, trials, seed):
    return NESTING, listops_prompts(
        tokenizer, length, NESTING, arguments=5, trials=trials, seed=seed
    )


def harness_documents(
    name: str,
    tokenizer,
    *,
    length: int = 4096,
    depths: Sequence[float] = retrieval.DEPTHS,
    trials: int = 16,
    seed: int = 0,
) -> list[dict]:
    """A task's prompts as dicts {"prompt", "answer", "choices" (texts, [] where none are offered),
    "label" (the place of the answer among them, -1), "depth"}. ValueError for unknown names and
    what the task itself refuses."""
    shown, make = TASKS[check_choice("task", name, TASKS)](tokenizer, length, depths, trials, seed)
    return [document for depth in shown for document in _documents(tokenizer, make(depth), depth)]


def harness_tasks(
    tokenizer,
    tasks: Sequence[str] | None = None,
    *,
    length: int = 4096,
    depths: Sequence[float] = retrieval.DEPTHS,
    trials: int = 16,
    seed: int = 0,
) -> dict:
    """name -> lm_eval Task, for `lm_eval.simple_evaluate(tasks=list(...))`. tasks: names of
    `TASKS`, None for all. Prompts and answers are tokenized again by lm_eval: `length` is what they
    have with this tokenizer.

    Raises Unsupported where lm_eval is not installed, ValueError for unknown names.
    """
    names = list(TASKS) if tasks is None else [check_choice("task", name, TASKS) for name in tasks]
    # optional: nothing else here needs it
    try:
        from lm_eval.api.task import ConfigurableTask
    except ImportError:
        raise Unsupported(
            "harness_tasks: lm_eval is not installed; pip install lm_eval, or call "
            "effattn.evaluate's functions"
        ) from None
    import datasets

    made = {}
    for name in names:
        documents = harness_documents(
            name, tokenizer, length=length, depths=depths, trials=trials, seed=seed
        )
        made[OURS + name] = ConfigurableTask(
            config=config_of(
                name,
                lambda documents=documents, **_: {"test": datasets.Dataset.from_list(documents)},
                bool(documents[0]["choices"]),
            )
        )
    return made


def config_of(name: str, dataset: Callable[..., dict], choices: bool) -> dict:
    """lm_eval's TaskConfig of a task. dataset(**metadata) -> {"test": the documents}."""
    asked = (
        {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
        if choices
        else {"output_type": "loglikelihood", "doc_to_target": "answer"}
    )
    return {
        "task": OURS + name,
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
        **asked,
    }


def _documents(tokenizer, prompts: retrieval.Prompts, depth: float) -> Iterator[dict]:
    """One document for every run of answer tokens in a prompt's question."""
    asked = prompts.asked.tolist()
    # a question may ask several times (associative recall): each is a document, with the true
    # answers of those before it in its prompt
    starts = [at for at, here in enumerate(asked) if here and not (at and asked[at - 1])]
    for row, (context, question) in enumerate(
        zip(prompts.context.tolist(), prompts.question.tolist(), strict=True)
    ):
        for start in starts:
            end = next((at for at in range(start, len(asked)) if not asked[at]), len(asked))
            choices = (
                []
                if prompts.choices is None
                else [tokenizer.decode([i]) for i in prompts.choices[row].tolist()]
            )
            answer = tokenizer.decode(question[start:end])
            yield {
                "prompt": tokenizer.decode(context + question[:start]),
                "answer": answer,
                "choices": choices,
                "label": choices.index(answer) if choices else -1,
                "depth": float(depth),
            }
