"""Runs the harness on a model and keeps every answer; called as a script, its own Hugging Face model on several jobs.

python harness_reference.py '[{"folder": ..., "files": [...], "max_length": ..., "chat": false}, ...]' ANSWERS.json
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answers(model: Any, files: list[str], chat: bool) -> dict[str, Any]:
    """Results of each task file, and of each of its requests the arguments and the answer."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load(files)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    found = evaluate(model, loaded, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat)
    samples = {
        name: [[list(each["arguments"]), each["resps"]] for each in found["samples"][name]] for name in found["samples"]
    }
    return {"results": found["results"], "samples": samples}


if __name__ == "__main__":
    from lm_eval.models.huggingface import HFLM

    jobs, found = json.loads(sys.argv[1]), []
    for job in jobs:
        model = HFLM(job["folder"], device="cpu", dtype="float32", batch_size=3, max_length=job["max_length"])
        found.append(answers(model, job["files"], job["chat"]))
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)
