"""Tasks of the lm-evaluation-harness as unseen tasks: `pip install 'duet_jax[eval]'`.

`benchmark` loads and rehearses one and turns its results into feedback; it needs the harness only when it is called.
`model` is our model as the harness sees one, on `scoring` and `decoding`.
"""

from duet_jax.feedback.harness.benchmark import Benchmark, HarnessTask, load_benchmark

__all__ = ["Benchmark", "HarnessTask", "load_benchmark"]
