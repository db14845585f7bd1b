"""Verdicts on generated code, and code that tries to be judged better than it is."""

from __future__ import annotations

import inspect
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from duet_jax.data import Example
from duet_jax.errors import FeedbackError
from duet_jax.feedback.rewards import _examiner, sandbox
from duet_jax.feedback.rewards import unit_tests as module
from duet_jax.feedback.rewards.sandbox import Isolation, Limits
from duet_jax.feedback.rewards.unit_tests import exam, identity, unit_tests

SHARED = Path(os.environ.get("DUET_DATA", Path(__file__).resolve().parents[3].parent / "shared" / "data"))
isolated = pytest.mark.skipif(
    not sandbox.isolation().available, reason=f"no isolation on this machine: {sandbox.isolation().detail}"
)

HEADER = '''from typing import List

def twice(x):
    """Helper of the prompt."""
    return 2 * x

def total(items: List[int]) -> int:
    """Twice the sum of the items.
    >>> total([1, 2])
    6
    """
'''
CHECK = """def check(candidate):
    assert candidate([1, 2]) == twice(3)
    assert candidate([]) == 0
    assert candidate([5, -7, 10]) == 16
"""
BODY = "    return twice(sum(items))\n"


def humaneval(**changes: Any) -> Example:
    meta = {"test": CHECK, "entry_point": "total", **changes}
    return Example(id="code/1", prompt=HEADER, response=BODY, meta=meta)


def mbpp(tests: list[str], **changes: Any) -> Example:
    return Example(id="code/2", prompt="Write it.", response="", meta={"test_list": tests, **changes})


def reward(reply: str, example: Example | None = None, **limits: Any) -> float:
    return unit_tests(Limits(**{"cpu_seconds": 3, "wall_seconds": 30.0, **limits}))([reply], [example or humaneval()])[
        0
    ]


def rows(name: str) -> list[Example]:
    files = [SHARED / name / f"{part}.jsonl" for part in ("train", "eval")]
    if not all(file.exists() for file in files):
        pytest.skip("the shared data folder is not here")
    records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Example(r["id"], r["prompt"], r["response"], meta={"test": r["test"], "entry_point": r["entry_point"]})
        for r in records
    ]


def empty(name: str, example: Example) -> str:
    return "    pass\n" if name == "humaneval" else f"def {example.meta['entry_point']}(*_, **__):\n    pass\n"


class TestCode:
    """Which program a reply stands for."""

    def test_a_continuation_is_appended_as_it_is(self) -> None:
        assert exam(humaneval()).code(BODY) == HEADER + BODY
        assert exam(humaneval()).code(" return 1") == HEADER + " return 1"

    @pytest.mark.parametrize("stop", module.STOPS)
    def test_a_continuation_ends_at_each_stop_string(self, stop: str) -> None:
        assert exam(humaneval()).code(f"{BODY}{stop} more()\n") == (HEADER + BODY + stop).removesuffix(stop)

    def test_a_definition_takes_the_place_of_the_header(self) -> None:
        code = "def total(items):\n    return 0\n\nprint(1)\n"
        assert exam(humaneval()).code(code) == HEADER[: HEADER.index("def total")] + "\n" + code

    def test_prose_before_a_definition_is_left_out(self) -> None:
        code = exam(humaneval()).code("Sure, here it is:\n\nimport math\n\ndef total(items):\n    return 0\n")
        assert code.endswith("\nimport math\n\ndef total(items):\n    return 0\n") and "Sure" not in code
        assert exam(mbpp(["assert f(1) == 1"])).code("Yes.\nN = 3\ndef f(x): return x") == "\nN = 3\ndef f(x): return x"

    def test_the_fenced_block_that_defines_the_function_is_taken(self) -> None:
        reply = (
            "First run\n```bash\npip install x\n```\nand then\n```python\ndef total(items):\n    return 1\n```\nDone."
        )
        assert exam(humaneval()).code(reply).endswith("\ndef total(items):\n    return 1\n")
        assert "pip" not in exam(humaneval()).code(reply)

    def test_a_fenced_body_continues_the_prompt_and_an_open_fence_ends_with_the_reply(self) -> None:
        assert exam(humaneval()).code(f"```python\n{BODY}```\n") == HEADER + BODY
        assert exam(humaneval()).code(f"```\n{BODY}") == HEADER + BODY

    def test_the_prompt_may_be_told_otherwise(self) -> None:
        worded = Example("1", ({"role": "user", "content": "Do it."},), "", meta={**humaneval().meta, "prompt": HEADER})
        assert exam(worded).code(BODY) == HEADER + BODY
        chat = Example("1", ({"role": "user", "content": HEADER},), "", meta=humaneval().meta)
        assert exam(chat).code(BODY) == HEADER + BODY


class TestExam:
    def test_tests_of_mbpp_come_after_imports_and_set_up(self) -> None:
        found = exam(
            mbpp(["assert f(a) == 1", "assert f(2) == 2"], test_setup_code="a = 1", test_imports=["import re"])
        )
        assert found.tests == "import re\na = 1\nassert f(a) == 1\nassert f(2) == 2"

    def test_check_is_called_once(self) -> None:
        assert exam(humaneval()).tests.endswith("\n\ncheck(total)\n")
        assert exam(humaneval(test=f"{CHECK}\ncheck(total)")).tests == f"{CHECK}\ncheck(total)"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"test": None}, r"code/1 has test None; it must be a text or a list"),
            ({"test": " "}, r"code/1 has no unit tests; it needs the column 'test' \(HumanEval\) or 'test_list'"),
            ({"test": ["assert 1", 2]}, r"code/1 has test \['assert 1', 2\]; it must be a text or a list of texts"),
            ({"entry_point": "not a name"}, r"code/1 has entry_point 'not a name'; it must be the name of a function"),
            ({"entry_point": "other"}, r"code/1 is in HumanEval's format, but its prompt does not define .*'other'"),
            ({"prompt": "Add them up."}, r"code/1 is in HumanEval's format, but its prompt does not define"),
        ],
    )
    def test_an_example_without_tests_that_fit_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(FeedbackError, match=message):
            exam(humaneval(**changes))


@isolated
class TestVerdicts:
    def test_right_is_one_and_wrong_is_zero(self) -> None:
        replies = {
            BODY: 1,
            "    pass\n": 0,
            "": 0,
            "    return 6\n": 0,
            "    return twice(sum(items)": 0,
            f"```python\n{HEADER}{BODY}```": 1,
            "Here:\ndef total(items):\n    return 2 * sum(items)\n\nassert total([]) == 0\n\nThis adds them up.": 1,
            "def total(items):\n    return 2 * sum(items)\n\ndef next_one(x):\n    return (x +": 1,
            "    return undefined\n": 0,
            "    return items.nothing\n": 0,
            "I cannot do that.": 0,
        }
        function = unit_tests()
        assert function(list(replies), [humaneval()] * len(replies)) == list(replies.values())

    def test_mbpp_may_use_objects_iterators_and_imports_of_the_code(self) -> None:
        code = (
            "import sys\nclass Node:\n    def __init__(self, value):\n        self.value, self.left = value, None\n"
            "def depth(node):\n    return 0 if node is None else 1 + depth(node.left)\n"
            "def count(n):\n    yield from range(n)\n"
            "def kinds(value, kind):\n    return isinstance(value, kind)\n"
            "def adder(n):\n    return lambda x: x + n\n"
            "def words(text):\n    from collections import Counter\n    return Counter(text)\n"
            "def fails():\n    raise KeyError('x')\n"
        )
        tests = [
            "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.value == 2",
            "assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6",
            "assert kinds(1, int) and not kinds('a', int)",
            "assert adder(2)(3) == 5",
            "assert words('aab') == {'a': 2, 'b': 1}",
            "assert sys.getsizeof(()) > 0",
            "try:\n    fails()\n    assert False\nexcept KeyError:\n    pass",
        ]
        assert reward(code, mbpp(tests)) == 1
        for test in tests[:5]:
            assert reward(code, mbpp([test.replace("2", "3", 1).replace("int)", "str)")])) == 0, test

    def test_values_cross_as_they_are(self) -> None:
        values = (
            "[None, True, 1, -(10**5000), 0.1, float('inf'), 2j, 'é\\ud800\\n', b'\\x00', (1, (2,)), [[]], {1, 2}, "
            "frozenset({3}), {(1, 'a'): {2: None}}, range(1, 9, 2), [int, dict]]"
        )
        test = f"values = {values}\nback = same(values)\nassert back == values and repr(back) == repr(values)"
        assert reward("def same(x):\n    return x", mbpp([test])) == 1
        assert reward("def same(x):\n    return x[::-1]", mbpp([test])) == 0

    def test_a_function_with_the_name_of_a_builtin_is_the_one_under_test(self) -> None:
        tests = ["assert sum(10, 15) == 25", "assert sum(1, 2) == 3"]
        for meta in ({}, {"entry_point": "sum"}):
            assert reward("def sum(a, b):\n    return a + b", mbpp(tests, **meta)) == 1
            assert reward("def sum(a, b):\n    return a - b", mbpp(tests, **meta)) == 0

    def test_code_that_does_not_end_is_wrong(self) -> None:
        assert reward("    while True: pass\n", cpu_seconds=1) == 0
        assert reward("    import time; time.sleep(60)\n", wall_seconds=2.0) == 0
        assert reward("    return [0] * 10**12\n") == 0
        assert reward("    return total(items)\n") == 0
        assert reward("    import os\n    while True: os.fork()\n", wall_seconds=3.0) == 0
        assert reward("    while True: print('x' * 10**6)\n", cpu_seconds=1) == 0

    def test_what_code_prints_is_of_no_concern(self) -> None:
        assert reward(f"    print('x' * 10**6)\n{BODY}") == 1

    def test_results_come_in_the_order_of_the_replies(self) -> None:
        slow = f"    import time; time.sleep(0.6)\n{BODY}"
        assert unit_tests()([slow, "    pass\n", BODY, "    pass\n"], [humaneval()] * 4) == [1, 0, 1, 0]

    def test_as_many_run_at_once_as_there_are_processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
        together = threading.Barrier(3, timeout=30)

        def run(*_: Any, **__: Any) -> sandbox.Outcome:
            together.wait()
            return sandbox.Outcome("ok", '{"verdict": "passed", "reason": ""}', "", 0)

        monkeypatch.setattr(sandbox, "run", run)
        assert unit_tests()([BODY] * 6, [humaneval()] * 6) == [1.0] * 6


# Each would be right by the verdict of a harness that runs code and tests in one interpreter.
FORGERIES = {
    "ends at once with status 0": "import os; os._exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "prints a verdict and ends": """
        import os, sys
        for stream in range(64):
            try:
                os.write(stream, b'{"verdict": "passed", "reason": ""}')
            except OSError:
                pass
        os._exit(0)""",
    "replaces builtins": """
        import builtins
        builtins.AssertionError = ValueError
        builtins.isinstance = builtins.all = builtins.any = lambda *_: True
        builtins.Exception = builtins.BaseException = type("E", (), {})""",
    "replaces check": """
        import sys
        for frame in sys._current_frames().values():
            while frame:
                frame.f_globals["check"] = lambda _: None
                frame = frame.f_back""",
    "traces": "import sys; sys.settrace(lambda *_: None); sys.setprofile(lambda *_: None)",
    "speaks at exit": """
        import atexit, os
        atexit.register(lambda: (print('{"verdict": "passed", "reason": ""}'), os._exit(0)))""",
    "kills the examiner": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "interrupts the examiner": "import os, signal; os.kill(os.getppid(), signal.SIGINT)",
    "kills all": "import os, signal; os.kill(-1, signal.SIGKILL)",
    "sends what is no answer": """
        import os
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b'nonsense\\n["value", ["list", 1]]\\n["value", {"list": 0, "x": 1}]\\n')
            except OSError:
                pass""",
    "exits from a finaliser": """
        class Late:
            def __del__(self):
                import os
                os._exit(0)
        Late()""",
}
LIAR = """
class Liar{base}:
    __eq__ = __ge__ = __le__ = __gt__ = __lt__ = __contains__ = lambda *_: True
    __ne__ = __bool__ = lambda *_: False
    __hash__ = lambda _: 0
    __instancecheck__ = lambda *_: True
def total(items):
    return Liar()
"""


@isolated
class TestForgery:
    @pytest.mark.parametrize("trick", FORGERIES)
    def test_a_trick_does_not_make_wrong_code_right(self, trick: str) -> None:
        body = inspect.cleandoc(FORGERIES[trick]).replace("\n", "\n    ")
        # Both where the code is loaded and where it is called.
        replies = [
            f"```\ndef total(items):\n    return None\n{inspect.cleandoc(FORGERIES[trick])}\n```",
            f"```\ndef total(items):\n    {body}\n```",
        ]
        assert unit_tests()(replies, [humaneval()] * 2) == [0, 0]

    @pytest.mark.parametrize("base", ["", "(int)", "(list)", "(str)", "(dict)"])
    def test_a_result_that_is_equal_to_everything_is_not(self, base: str) -> None:
        assert reward(f"```\n{LIAR.format(base=base)}```") == 0
        # In one interpreter it passes, so the trick is a real one.
        namespace: dict[str, Any] = {"twice": lambda x: 2 * x}
        exec(LIAR.format(base=base) + CHECK + "\ncheck(total)", namespace)

    def test_the_tests_are_nowhere_in_the_process_of_the_code(self) -> None:
        """The code looks through all that it can reach for an expected value that stands in the tests alone."""
        code = """
            import gc, sys
            def total(items):
                seen, todo = set(), [*gc.get_objects(), *sys._current_frames().values(), *sys.modules.values()]
                while todo:
                    item = todo.pop()
                    if id(item) in seen:
                        continue
                    seen.add(id(item))
                    if isinstance(item, str) and "expected" + "_" + "value" in item:
                        return int(item.partition("expected" + "_" + "value = ")[2].split()[0])
                    todo += gc.get_referents(item)
                return len(seen)
        """
        test = "{}\ndef check(candidate):\n    found = candidate([])\n    assert found {}\n"
        reply = f"```\n{inspect.cleandoc(code)}\n```"
        secret = "expected_value = 918273"
        assert reward(reply, humaneval(test=test.format(secret, "== expected_value")), cpu_seconds=20) == 0
        # It did look, at more than a few objects.
        assert reward(reply, humaneval(test=test.format(secret, "> 10000")), cpu_seconds=20) == 1

    def test_a_builtin_of_the_tests_stays_their_own(self) -> None:
        code = "def f(x):\n    return 0\ndef set(x):\n    return 0\ndef sorted(x):\n    return 0\n"
        assert reward(code, mbpp(["assert set(f(1)) == set([2])"])) == 0
        assert reward(code, mbpp(["assert f(1) == sorted([2])"])) == 0

    def test_ending_after_the_first_right_answer_is_wrong(self) -> None:
        code = "    import os\n    return 6 if len(items) == 2 else os._exit(0)\n"
        assert reward(code) == 0

    def test_a_test_that_forgives_every_exception_does_not_forgive_an_early_end(self) -> None:
        tests = ["try:\n    f()\nexcept Exception:\n    pass"]
        assert reward("def f():\n    raise ValueError", mbpp(tests)) == 1
        assert reward("import os\ndef f():\n    os._exit(0)", mbpp(tests)) == 0


@isolated
class TestBrokenTests:
    @pytest.mark.parametrize(
        ("tests", "message"),
        [
            (["assert f(1) =="], "do not work: SyntaxError"),
            (["assert f(lambda x: x) == 1"], "do not work: .* object of type function, and only data can cross"),
            (["x = 1"], "do not work: the tests call nothing of the code under test"),
        ],
    )
    def test_tests_that_cannot_run_are_an_error_and_no_zero(self, tests: list[str], message: str) -> None:
        with pytest.raises(FeedbackError, match=f"The tests of example code/2 {message}"):
            reward("def f(x):\n    return 1", mbpp(tests))

    def test_a_prompt_that_does_not_run_is_an_error(self) -> None:
        with pytest.raises(FeedbackError, match="code/1 do not work: ModuleNotFoundError: No module named 'numpy'"):
            reward(BODY, humaneval(prompt=f"import numpy\n{HEADER}"))

    def test_an_error_ends_the_batch_and_not_after_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
        runs = []

        def run(*_: Any, **__: Any) -> sandbox.Outcome:
            runs.append(time.monotonic())
            return sandbox.Outcome("error", "", "why", 1)

        monkeypatch.setattr(sandbox, "run", run)
        with pytest.raises(FeedbackError, match="The tests of example code/1 could not be run: why"):
            unit_tests()([BODY] * 500, [humaneval()] * 500)
        assert len(runs) < 500


def test_it_refuses_at_once_where_nothing_can_be_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(False, "unshare: Operation not permitted"))
    with pytest.raises(FeedbackError, match="only in isolation"):
        unit_tests()
    assert unit_tests(unsafe=True)([BODY, "    pass\n"], [humaneval()] * 2) == [1, 0]


def test_the_identity_changes_with_all_that_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {identity(), identity(Limits(cpu_seconds=9)), identity(unsafe=True)}
    changed = tmp_path / "_examiner.py"
    changed.write_text(Path(_examiner.__file__).read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    monkeypatch.setattr(_examiner, "__file__", str(changed))
    assert len(seen | {identity()}) == 4
    assert identity() == identity()


@isolated
@pytest.mark.parametrize(("name", "step"), [("humaneval", 12), ("mbpp", 80)])
def test_canonical_solutions_are_right_and_empty_ones_wrong(name: str, step: int) -> None:
    examples = rows(name)[::step]
    replies = [example.response for example in examples] + [empty(name, example) for example in examples]
    assert unit_tests()(replies, examples * 2) == [1] * len(examples) + [0] * len(examples)


@isolated
@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_all_canonical_solutions_are_right_and_all_empty_ones_wrong(name: str) -> None:
    examples = rows(name)
    function = unit_tests()
    right = function([example.response for example in examples], examples)
    wrong = function([empty(name, example) for example in examples], examples)
    assert [example.id for example, value in zip(examples, right, strict=True) if value != 1] == []
    assert [example.id for example, value in zip(examples, wrong, strict=True) if value != 0] == []
