r"""Grading: hand-made cases, exact rationals, hostile answers, threads, signals, and workers that die."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterglow.core.answer_comparison import compare_exactly, normalise, parse_number
from afterglow.core.answer_extraction import after_think, find_answer, last_boxed, last_choice
from afterglow.core.errors import MissingDependencyError, RecipeError
from afterglow.core.grading import Grader


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, timeout=20) as grader:
        yield grader


# gold, content of the box, right?
SAME = [
    ("18", "18", True),
    ("18", "18.0", True),
    ("18.0", "18", True),
    ("18", "19", False),
    ("-5", "−5", True),  # unicode minus
    ("1234", "1,234", True),
    ("1234", "1{,}234", True),
    (r"10,\!080", "10080", True),
    ("1,000,000", "1000000", True),
    ("12", "1 2", False),
    ("0.5", r"\frac{1}{2}", True),
    ("0.5", r"\dfrac12", True),
    (r"\frac43", "4/3", True),
    (r"\frac{4}{3}", "1.333333", True),
    (r"\frac{4}{3}", "1.33", False),
    ("0.0000672", "0.0000671", False),  # both round to 0.000067
    (r"1\frac{4}{5}", r"\frac{9}{5}", True),
    (r"137 \frac{1}{2}", "137.5", True),
    (r"50\%", "50", True),
    (r"50\%", "0.5", True),
    ("50", r"50\%", True),
    (r"50\%", "5", False),
    (r"\$36", "36", True),
    ("36", r"\$36.00", True),
    ("18", r"18 \text{ dollars}", True),
    ("448", "448{ml}", True),
    ("5", "5 cm", True),
    ("5", r"5\text{ cm}^2", True),
    ("6", "6th", True),
    ("5", "5x", False),  # a bare letter is no unit
    ("5", "5 million", False),
    ("5", "5 or 6", False),
    (r"90^\circ", "90", True),
    ("90", "90°", True),
    (r"10^{4}", "10000", True),
    ("1500000", r"1.5 \times 10^6", True),
    (".0000672", r"6.72 \times 10^{-5}", True),
    ("3", "x = 3", True),
    ("f(x)=2x", "2x", True),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{even}", r"\text{Even}", True),
    (r"\text{even}", r"\text{neve}", False),  # the same product of letters
    (r"\text{(B)}", "B", True),
    (r"3\sqrt{13}", r"\sqrt{117}", True),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
    (r"8 \pi \text{ cm}", r"8\pi", True),
    ("(a+5)(b+2)", "ab + 2a + 5b + 10", True),
    ("a + b + c", "c + b + a", True),
    ("y = 2x + 3", "y = 3 + 2x", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", True),
    ("(1,2)", "(2,1)", False),
    ("(1,2)", "[1,2]", False),
    (r"(2,\infty)", r"[2,\infty)", False),
    (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)", True),
    ("3, 5, 7", "7, 5, 3", True),
    ("3, 5, 7", "3, 5", False),
    ("1,3", r"x=1 \text{ or } x=3", True),
    ("(1,1), (3,2)", r"(3,2) \text{ and } (1,1)", True),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5", True),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}", True),
    (r"m_{\max }=n^{2}-n-1", "n^2-n-1", True),
]


@pytest.mark.parametrize(("gold", "answer", "right"), SAME)
def test_comparison(grader, gold, answer, right):
    assert grader.check_gold(gold) is None
    assert grader.grade(rf"So it is $\boxed{{{answer}}}$.", gold).correct is right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed 5", "5"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{4} and then \boxed{5", "4"),  # the last one never closes
        (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3"),
        (r"\boxed{5}$ cats, or rather $\boxed{6}", "6"),
        ("no box {at} all", None),
    ],
)
def test_last_balanced_box(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("response", "rest"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the template opened the block
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a", None),
        ("<think>a</think>b<think>c", None),
        ("no block", "no block"),
        (r"<think>a\end{think}<answer>5</answer>", "<answer>5</answer>"),
        ("<think>I should write <answer>5</answer> but first", None),
    ],
)
def test_only_what_follows_the_think_block_counts(response, rest):
    assert after_think(response) == rest


@pytest.mark.parametrize(
    ("text", "extract", "answer", "marker"),
    [
        (r"\boxed{5}", "boxed", "5", "boxed"),
        ("#### 18", "boxed", None, "boxed"),
        ("It costs $18.\n#### 18 ", "marked", "18", "#### line"),
        (r"\boxed{4} is wrong" + "\n#### 18", "marked", "18", "#### line"),
        ("#### Step 2: add\n" + r"so \boxed{4}", "marked", "4", "boxed"),
        ("#### Result\nThe answer is 7.", "marked", "7", "answer phrase"),
        (r"<answer> \boxed{64}", "marked", "64", "answer tag"),
        ("<answer>11/24</answer>", "marked", "11/24", "answer tag"),
        ("The answer is: $\\frac{1}{2}$.", "marked", r"\frac{1}{2}", "answer phrase"),
        ("The final answer is 42 dollars, so we stop.", "marked", "42", "answer phrase"),
        ("**Answer:** 1,234.", "marked", "1,234", "answer phrase"),
        ("The answer is 2x+3.", "marked", "2x+3", "answer phrase"),
        ("160+80+20=<<160+80+20=260>>260 sheep\nA: 260", "marked", None, "marked"),
        ("160+80+20=<<160+80+20=260>>260 sheep\nA: 260", "last", "260", "last number"),
        ("from 3 to -2.5.", "last", "-2.5", "last number"),
        ("It is $1,234.", "last", "1,234", "last number"),
        ("nothing", "last", None, "last"),
    ],
)
def test_where_the_answer_may_stand(text, extract, answer, marker):
    assert find_answer(text, extract) == (answer, marker)


@pytest.mark.parametrize(
    ("response", "gold", "reason"),
    [
        ("", "5", "empty response"),
        (None, "5", "empty response"),
        ("<think>5", "5", "truncated think block"),
        ("It is 5.", "5", "no boxed answer"),
        (r"\boxed{}", "5", "empty answer"),
        (r"\boxed{5}", None, "gold is empty"),
        (r"\boxed{5}", "", "gold is empty"),
        (r"\boxed{5}", "t(0,4]", "gold cannot be parsed"),
        (r"\boxed{\frac{1}{}", "5", "no boxed answer"),
        (r"\boxed{+\cdot=}", "5", "answer cannot be parsed"),
        (r"\boxed{" + "1+" * 5000 + "1}", "5", "answer is too long"),
    ],
)
def test_not_gradable_says_why(grader, response, gold, reason):
    grade = grader.grade(response, gold)
    assert (grade.verdict, grade.reason, grade.correct) == ("not_gradable", reason, None)


def test_reason_names_comparison_and_marker(grader):
    assert grader.grade(r"\boxed{5}", "5").reason == "exact number"
    assert grader.grade(r"\boxed{5 cm}", "5").reason == "exact number, unit ignored"
    assert grader.grade(r"\boxed{\sqrt{4}}", "2").reason == "math-verify"
    with Grader(extract="marked") as marked:
        assert marked.grade("#### 6", "5").reason == "exact number (#### line)"


def test_golds_of_several_types(grader):
    assert grader.grade(r"\boxed{145}", 145.0).correct
    assert grader.grade(r"\boxed{204}", 204).correct
    assert grader.grade(r"\boxed{84, 69}", ["$69$", "$84$"]).correct
    assert grader.check_gold(None) == grader.check_gold("  ") == grader.check_gold(float("nan")) == "gold is empty"
    assert grader.check_gold("t(0,4]") == "gold cannot be parsed"


@pytest.mark.parametrize(
    ("response", "extract", "correct"),
    [
        (r"\boxed{B}", "boxed", True),
        (r"\boxed{\text{(B)}}", "boxed", True),
        (r"\boxed{\text{B. Paris}}", "boxed", True),
        (r"\boxed{b}", "boxed", True),
        (r"\boxed{C}", "boxed", False),
        (r"\boxed{A, B}", "boxed", None),
        (r"\boxed{B or C}", "boxed", None),
        (r"\boxed{24}", "boxed", None),
        ("The answer is (B).", "boxed", None),
        ("The answer is (B).", "marked", True),
        ("Answer: **B**", "marked", True),
        ("The answer is option B", "marked", True),
        ("(A) is wrong, therefore\n\n**B**", "last", True),
        ("A cat is what I saw.", "last", None),
    ],
)
def test_multiple_choice(response, extract, correct):
    grader = Grader("choice", extract=extract)
    assert grader.check_gold("(B)") is None
    assert grader.check_gold("24") == "gold is not one of the letters A to J"
    assert grader.grade(response, "B").correct is correct


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("9.8", "9.81", True),
        ("9.6", "9.81", False),
        (r"3.0 \times 10^8 \text{ m/s}", "299792458", True),
        (r"v = 2.99e8", "299792458", True),
        (r"\frac{\pi}{2}", "1.5708", True),
        (r"50\%", "0.5", True),
        (r"10^{10^{10}}", "5", None),
        (r"x", "5", None),
    ],
)
def test_numeric_tolerance(numeric, answer, gold, correct):
    assert numeric.check_gold(gold) is None
    assert numeric.grade(rf"\boxed{{{answer}}}", gold).correct is correct


@pytest.fixture(scope="module")
def numeric():
    with Grader("numeric", rel_tol=0.01) as grader:
        yield grader


def test_absolute_tolerance():
    grader = Grader("numeric", rel_tol=0, abs_tol=0.1)
    assert grader.grade(r"\boxed{4.1}", "4.2").correct
    assert grader.grade(r"\boxed{4.09}", "4.2").correct is False


def test_unknown_options_are_refused():
    with pytest.raises(RecipeError, match="`kind` is 'maths'; use one of math, choice, numeric"):
        Grader("maths")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match="`extract`"):
        Grader(extract="anything")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------- exact rationals

rationals = st.fractions(max_denominator=10**6).filter(lambda f: abs(f) < 10**12)


def spellings(value: Fraction) -> list[str]:
    sign, n, d = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [f"{sign}{n}/{d}", rf"{sign}\frac{{{n}}}{{{d}}}", rf"\dfrac{{{sign}{n}}}{{{d}}}", f"${value}$"]
    if d == 1:
        forms += [f"{value}", f"{value.numerator:,}", f"{value}.0", rf"{sign}{n:,}\text{{ km}}".replace(",", "{,}")]
    return forms


@given(rationals)
@settings(max_examples=100, deadline=None)
def test_every_spelling_of_a_rational_is_equal(value):
    for spelling in spellings(value):
        number = parse_number(normalise(spelling))
        assert number is not None and number.value == value, spelling


@given(rationals, rationals)
@settings(max_examples=100, deadline=None)
def test_different_rationals_differ(left, right):
    for a, b in zip(spellings(left), spellings(right), strict=False):
        verdict = compare_exactly(normalise(a), normalise(b))
        assert verdict is not None and verdict[0] is (left == right)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
@settings(max_examples=100, deadline=None)
def test_decimals_are_exact(value):
    number = parse_number(normalise(f"{value:f}"))
    assert number is not None and number.value == Fraction(value)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_text_breaks_extraction_or_exact_comparison(text):
    for extract in ("boxed", "marked", "last"):
        find_answer(after_think(text) or "", extract)
    compare_exactly(normalise(text), normalise("\\frac{1}{2}"))
    assert text.strip() == "" or compare_exactly(normalise(text), normalise(text)) is not None


# ------------------------------------------------------------------------------- hostile answers and processes

HOSTILE = [r"10^{10^7}!", r"9^{9^{9^9}}"]


def test_hostile_answers_cost_one_worker_each_and_no_more():
    with Grader(workers=1, timeout=0.5) as grader:
        for n, answer in enumerate(HOSTILE, start=2):
            assert grader.grade(rf"\boxed{{{answer}}}", r"\sqrt{2}").reason == "timed out"
            assert grader.grade(rf"\boxed{{\sqrt{{{2 * n * n}}}}}", rf"{n}\sqrt{{2}}").correct


@pytest.mark.timeout(120)  # quadratic time would be hours
def test_a_megabyte_is_read_in_linear_time():
    million = 10**6
    numbers = "7" * million
    for text, answer in {
        r"\boxed{" * (million // 7): None,
        r"\boxed{" + numbers + "}": numbers,
        "{" * million + "}" * million: None,
        "\n" * million: None,
        "answer is " * (million // 10) + "5": "5",
        "1,111," * (million // 6): "1,111",
        "<think>" * (million // 7) + "</think>": None,
    }.items():
        assert find_answer(after_think(text) or "", "last")[0] == answer
        assert last_choice(text) is None


def test_memory_limit_ends_the_answer_not_the_run():
    with Grader(workers=1, timeout=20, memory_mb=128) as grader:
        grade = grader.grade(r"\boxed{2^{2^{34}} - \sqrt{2}}", r"\sqrt{2}")
        assert grade.correct is not True
        assert grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").correct


def test_a_worker_that_is_killed_is_replaced(grader):
    with Grader(workers=1, timeout=20) as grader:
        assert grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").correct
        (process,) = grader._pool._processes
        os.kill(process.pid, signal.SIGKILL)
        assert grader.grade(r"\boxed{\sqrt{18}}", r"3\sqrt{2}").correct  # asked once more, of a new worker
        assert {process.pid for process in grader._pool._processes} != {process.pid}


def test_a_worker_that_dies_twice_under_an_answer_gives_up(monkeypatch):
    from afterglow.core import grading_pool

    def die(*_):
        raise grading_pool._WorkerDiedError

    monkeypatch.setattr(grading_pool._Worker, "ask", die)
    with Grader(workers=1) as grader:
        assert grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").reason == "worker died"


def test_workers_start_only_for_symbolic_answers_and_end_with_the_grader():
    grader = Grader(workers=2)
    assert grader.grade(r"\boxed{5}", "5").correct and not grader._pool._processes
    assert grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}").correct
    (process,) = grader._pool._processes
    assert process.poll() is None
    del grader
    gc.collect()
    assert process.wait(timeout=10) is not None


def test_a_closed_grader_refuses_symbolic_answers():
    grader = Grader()
    grader.close()
    grader.close()
    assert grader.grade(r"\boxed{5}", "5").correct
    with pytest.raises(RuntimeError, match="closed"):
        grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")


def test_close_while_another_thread_grades():
    grader = Grader(workers=1, timeout=60)
    seen = []

    def grade():
        try:
            seen.append(grader.grade(rf"\boxed{{{HOSTILE[0]}}}", r"\sqrt{2}"))
        except RuntimeError as error:
            seen.append(error)

    thread = threading.Thread(target=grade)
    thread.start()
    while not grader._pool._processes:
        time.sleep(0.01)
    grader.close()
    thread.join(timeout=30)
    assert not thread.is_alive() and "closed" in str(seen[0])


def test_worker_ends_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from afterglow.core.grading import Grader\n"
        "grader = Grader()\n"
        "grader.grade(r'\\boxed{\\sqrt{8}}', r'2\\sqrt{2}')\n"
        "print(next(iter(grader._pool._processes)).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    worker, deadline = int(parent.stdout), time.monotonic() + 10
    while time.monotonic() < deadline and _runs(worker):
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_worker_that_cannot_start_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr4')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader() as grader, pytest.raises(MissingDependencyError, match=r"no antlr4.*math-verify"):
        grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")


def test_worker_without_room_to_start_names_the_limit():
    with Grader(memory_mb=40) as grader, pytest.raises(MissingDependencyError, match="40 MiB"):
        grader.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")


def test_worker_protocol_survives_what_libraries_print():
    request = json.dumps({"task": "parses", "texts": ["\\sqrt{2}"], "seconds": 5})
    worker = subprocess.run(
        [sys.executable, "-m", "afterglow.core.grading_worker", "1024"],
        input=f"{request}\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [json.loads(line) for line in worker.stdout.splitlines()] == [{"ready": True}, {"result": True}]


# --------------------------------------------------------------------------------------- threads and signals


def test_what_is_kept_of_a_huge_answer_is_small(grader):
    assert len(grader.grade(rf"\boxed{{{'7' * 10**6}}}", "7").extracted) == 2000


def test_many_threads_get_their_own_answers(grader):
    results = {}

    def grade(n):
        results[n] = grader.grade(rf"\boxed{{\sqrt{{{n * n}}} + \sqrt{{2}}}}", rf"{n} + \sqrt{{2}}").correct

    threads = [threading.Thread(target=grade, args=(n,)) for n in range(2, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(2, 18), True)


def test_alarm_of_the_caller_stays_untouched():
    def handler(*_):
        raise AssertionError("the caller's alarm must not ring here")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        with Grader(workers=1, timeout=0.5) as grader:
            assert grader.grade(rf"\boxed{{{HOSTILE[0]}}}", r"\sqrt{2}").reason == "timed out"
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] < 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_grade_many_keeps_the_order_and_reports_each(grader):
    pairs = [(rf"\boxed{{{n % 7}}}", "3") for n in range(200)] + [(r"\boxed{\sqrt{9}}", "3"), (None, "3")]
    done = {}
    grades = grader.grade_many(iter(pairs), on_done=done.__setitem__)
    assert [grade.correct for grade in grades] == [n % 7 == 3 for n in range(200)] + [True, None]
    assert done == dict(enumerate(grades))


def test_grader_refuses_to_live_on_in_a_forked_child(grader):
    grader._pool._pid, before = -1, grader._pool._pid
    try:
        with pytest.raises(RuntimeError, match="fork"):
            grader.grade(r"\boxed{\sqrt{50}}", r"5\sqrt{2}")
    finally:
        grader._pool._pid = before
