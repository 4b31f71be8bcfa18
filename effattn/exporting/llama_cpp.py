"""llama.cpp on this machine's processors, in a process of its own: what it makes of a file.

    require()                                    # ValueError, saying what to install
    ask(folder, {"prompts": [[1, 2, 3]], "new": 64, "full": 4, "vocabulary": 49152})

The package `xllamacpp` has it whole, in a wheel. A file that it cannot read may end the process it
runs in, so that is never ours; it is asked through JSON, on one thread for each core."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NAME, PACKAGE = "llama.cpp", "xllamacpp"
FILE = "model.gguf"  # in the folder of an export
INSTALL = "pip install 'effattn[llama-cpp]'"
SPARE = 512  # tokens of context beyond what is asked for: a text, and steps that are timed


def require() -> None:
    """ValueError, saying what to install, where llama.cpp is not there."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"check: it needs llama.cpp, which is not installed: {INSTALL}")


def version() -> str:
    """Of the package that has it."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def ask(folder: Path, question: dict) -> dict:
    """The answer of `_answer` to a question about the file in a folder, or about a file. "exact" in
    it: with a float32 cache, so that what is compared is the file; llama.cpp's own is float16.
    RuntimeError, with its last words, when it cannot read the file."""
    require()
    file = folder / FILE if folder.is_dir() else folder
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        given.write_text(json.dumps(question | {"file": str(file)}), encoding="utf-8")
        command = [sys.executable, "-I", str(Path(__file__)), str(given), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not answer.is_file():
            last = [line for line in done.stderr.splitlines() if "rror" in line] or ["no words"]
            raise RuntimeError(f"llama.cpp cannot run {file}: {last[-1].strip():.300}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _answer(question: dict) -> dict:
    """tokens: of each prompt the greedy continuation. logprobs: of each prompt, after each of its
    first `full` new tokens' places, log-probabilities by token. texts: of each of `texts`, how many
    tokens it was, and the log-probability of the likeliest next one. speeds: tokens a second while
    decoding after each of `contexts`, the median of `repeats`."""
    server = _server(question)
    new, full, size = question["new"], question["full"], question["vocabulary"]
    tokens, logprobs = [], []
    for prompt in question["prompts"]:
        tokens.append(_greedy(server, prompt, new))
        known = [[*prompt, *tokens[-1][:more]] for more in range(min(full, len(tokens[-1])))]
        places = [_complete(server, one, 1, size, cached=True)[0] for one in known]
        logprobs.append([_row(place[0], size) for place in places])
    texts = []
    for text in question.get("texts", ()):
        places, answer = _complete(server, text, 1, 1)
        texts.append([answer["usage"]["prompt_tokens"], places[0]["logprob"]])
    speeds = {
        str(context): _speed(server, question["prompts"][0], context, question["repeats"])
        for context in question.get("contexts", ())
    }
    cache = "float32" if question.get("exact") else "float16"
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "texts": texts,
        "speeds": speeds,
        "numbers": f"cache {cache}",
    }


def _server(question: dict):
    import xllamacpp

    longest = max(map(len, question["prompts"]))
    needed = max(longest + question["new"], *question.get("contexts", ()), 0)
    options = xllamacpp.CommonParams()
    options.model.path = question["file"]
    options.n_ctx, options.n_parallel, options.n_gpu_layers = needed + SPARE, 1, 0
    for part in (options.cpuparams, options.cpuparams_batch):
        part.n_threads = question["threads"]
    options.warmup, options.verbosity = False, -1
    if question.get("exact"):  # keys with large numbers lose what float16 has no room for
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.flash_attn_type = flash
    return xllamacpp.Server(options)


def _greedy(server, prompt: list[int], new: int) -> list[int]:
    """Up to `new` tokens; fewer where one of them ends the text, or is not told."""
    places, answer = _complete(server, prompt, new, 1)
    if len(places) == answer["usage"]["completion_tokens"]:
        return [one["id"] for one in places]
    # It does not tell tokens that are a part of a character: one by one, up to the first of them.
    found: list[int] = []
    while len(found) < new:
        places, _ = _complete(server, [*prompt, *found], 1, 1, cached=True)
        if not places:
            break
        found.append(places[0]["id"])
    return found


def _complete(
    server, prompt, new: int, probabilities: int, cached: bool = False
) -> tuple[list[dict], dict]:
    """What follows a prompt, greedily: an entry for each new token; and the whole answer."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0.0,
            "logprobs": probabilities,
            "cache_prompt": cached,
        }
    )
    if "choices" not in answer:
        raise RuntimeError(f"Error: {answer}")
    return (answer["choices"][0]["logprobs"] or {}).get("content") or [], answer


def _row(place: dict, vocabulary: int) -> list[float]:
    row = [-math.inf] * vocabulary
    for one in place["top_logprobs"]:
        row[one["id"]] = one["logprob"]
    return row


def _speed(server, prompt: list[int], context: int, repeats: int) -> float:
    """Tokens a second of 32 steps after `context` tokens."""
    longer = (prompt * (context // len(prompt) + 1))[:context]
    # what it has read of the text once is in its cache the next time
    told = [_complete(server, longer, 32, 1, cached=True)[1] for _ in range(repeats)]
    found = [one["timings"] for one in told]
    return sorted(one["predicted_per_second"] for one in found)[repeats // 2]


def cores() -> int:
    """How many processors this process may use; OMP_NUM_THREADS, where that is fewer. Threads of
    llama.cpp wait for each other by spinning: more than there are cores for stand in each other's
    way."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(here, int(said)) if said.isdigit() and int(said) else here


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(_answer(asked)), encoding="utf-8")
