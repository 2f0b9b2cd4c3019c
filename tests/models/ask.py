"""One SGLang engine in a process of its own: ``python -m tests.models.ask MODEL QUESTIONS``.

QUESTIONS is JSON: keywords for ``sgl.Engine``, prompts as token ids, how many new tokens. The
answers go to standard output as one line of JSON, the last one.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(model: str, questions: str) -> None:
    import sglang

    asked = json.loads(questions)
    engine = sglang.Engine(
        model_path=model,
        attention_backend="hip_attention",
        skip_tokenizer_init=True,
        **asked["engine"],
    )
    try:
        answers = [answer(engine, ids, asked["new"]) for ids in asked["prompts"]]
    finally:
        engine.shutdown()
    print(json.dumps(answers))


def answer(engine: Any, ids: list[int], new: int) -> dict[str, Any]:
    """The greedy tokens, and the log-probability of every token given and of the best new ones."""
    sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    meta = engine.generate(
        input_ids=ids,
        sampling_params=sampling,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=5,
    )["meta_info"]
    return {
        "prompt": [value for value, _, _ in meta["input_token_logprobs"]][1:],
        "prompt_best": [[token for _, token, _ in best] for best in meta["input_top_logprobs"][1:]],
        "new": [token for _, token, _ in meta["output_token_logprobs"]],
        "best": [
            [(value, token) for value, token, _ in best] for best in meta["output_top_logprobs"]
        ],
    }


if __name__ == "__main__":
    # the engine starts processes by spawning, which import this file again
    main(*sys.argv[1:])
