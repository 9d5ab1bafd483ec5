"""Sessions as a model uses them; what hostile code tries is in test_sandbox_hostile.py."""

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from afterglow.core import sandbox_local
from afterglow.core.errors import RecipeError, SandboxError
from afterglow.core.sandbox import SandboxConfig, shorten
from afterglow.core.sandbox_local import LocalSandbox


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request):
    config = SandboxConfig(sandbox_timeout=20, sandbox_memory_mb=256, sandbox_output_chars=400)
    try:
        with LocalSandbox(config, (request.param,)) as sandbox:
            yield sandbox
    except SandboxError as error:
        pytest.skip(f"this machine allows no {request.param}: {error}")


@pytest.fixture(scope="module")
def impatient():
    with LocalSandbox(SandboxConfig(sandbox_timeout=0.8, sandbox_unisolated=True)) as sandbox:
        yield sandbox


@pytest.fixture
def session(sandbox):
    with sandbox.session() as session:
        yield session


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def has_ended(process):
    return not process.is_running() or process.status() == "zombie"


# ---------------------------------------------------------------------------------------------------------------------
# a notebook


def test_state_is_kept_and_the_last_expression_echoed(session):
    assert session.run("x = 20\ndef f(n):\n    return n + 1").output == ""
    assert session.run("f(x)").output == "21\n"
    assert session.run("_ * 2, Out[2], In[2]").output == "(42, 21, 'f(x)')\n"
    assert session.run("x;").output == ""
    assert session.run("None").output == ""
    assert session.run("print('a')\n'b'").output == "a\n'b'\n"
    assert session.run("for i in range(2):\n    i").output == ""
    assert session.run("").status == "ok"


def test_numpy_and_sympy_are_there(session):
    assert session.run("np.arange(3) + numpy.ones(3)").output == "array([1., 2., 3.])\n"
    assert session.run("sympy.solve(sympy.Symbol('x')**2 - 2)").output == "[-sqrt(2), sqrt(2)]\n"


def test_an_error_shows_the_lines_of_the_cells_and_keeps_the_state(session):
    session.run("def f(x):\n    return sympy.Integer(1) / x")
    result = session.run("a = 1\nf([])")
    assert result.status == "error"
    assert 'File "<cell 2>", line 2, in <module>\n    f([])' in result.output
    assert 'File "<cell 1>", line 2, in f\n    return sympy.Integer(1) / x' in result.output
    assert "site-packages" not in result.output
    assert result.output.splitlines()[-1].startswith("TypeError: unsupported operand")
    assert session.run("a").output == "1\n"
    result = session.run("1 +")
    assert result.status == "error" and result.output.endswith("SyntaxError: invalid syntax\n")


def test_classes_of_a_cell_pickle_and_dataclasses_work(session):
    code = "import dataclasses, pickle\n@dataclasses.dataclass\nclass P:\n    x: int\npickle.loads(pickle.dumps(P(3)))"
    assert session.run(code).output == "P(x=3)\n"


def test_exit_does_not_end_the_session(session):
    assert session.run("x = 1\nexit()").status == "ok"
    result = session.run("import sys; sys.exit('no solution')")
    assert (result.status, result.output) == ("error", "SystemExit: no solution\n")
    assert session.run("x").output == "1\n"


def test_reading_input_fails_at_once(session):
    assert "EOFError" in session.run("input('? ')").output


def test_all_that_is_printed_arrives_in_order(session):
    code = "import os, sys\nprint('a')\nos.write(1, b'b\\n')\nprint('c', file=sys.stderr)\nprint('d', end='')"
    assert session.run(code).output == "a\nb\nc\nd"
    assert session.run("print('ü∞', b'\\xff'.decode('latin-1'), '\\ud800')").output == "ü∞ ÿ \\ud800\n"
    session.run("import sys; sys.stdout.close()")
    assert session.run("print('still here')").output == "still here\n"


def test_long_output_keeps_its_head_and_tail(session):
    result = session.run("print('a' * 5_000_000 + 'z')")
    assert result.output == "a" * 200 + "\n[... 4,999,602 characters left out ...]\n" + "a" * 198 + "z\n"
    assert shorten("x" * 400, 400) == "x" * 400
    assert shorten("0123456789", 4) == "01\n[... 6 characters left out ...]\n89"


def test_integers_of_many_digits_can_be_printed(session):
    assert len(session.run("print(len(str(10**50_000)))").output) == 6
    assert "ValueError" in session.run("print(10**200_000)").output


def test_a_cell_that_is_too_long_is_not_run(session):
    result = session.run("x = 1 #" + "." * 100_000)
    assert result.status == "error" and "The cell was not run" in result.output
    assert session.run("'é' * 3, len('''" + "x" * 90_000 + "''')").output == "('ééé', 90000)\n"


def test_the_temp_folder_is_the_working_folder(sandbox, session):
    if sandbox.isolation == "landlock":
        assert "PermissionError" in session.run("open('/tmp/a', 'w')").output
        return
    code = "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n    f.write('hello')\nopen('a', 'w').write('b')"
    assert session.run(code).output == "1\n"
    assert session.run("import os; os.listdir(), os.getcwd() == tempfile.gettempdir()").output == "(['a'], True)\n"


def test_asyncio_works(session):
    code = "import asyncio\nasync def f():\n    await asyncio.sleep(0.001)\n    return 7\nasyncio.run(f())"
    assert session.run(code).output == "7\n"


def test_every_session_starts_the_same(sandbox):
    code = "import random\n(random.random(), np.random.rand(), sympy.randprime(1, 10**9), {'a', 'b', 'c', 'd'})"
    with sandbox.session() as one, sandbox.session() as other:
        assert one.run("y = 5\n" + code).output == other.run(code).output
        assert "NameError" in other.run("y").output


# ---------------------------------------------------------------------------------------------------------------------
# limits


def test_at_the_time_limit_a_cell_is_interrupted_and_its_state_survives(impatient):
    with impatient.session() as session:
        session.run("x = 5")
        result = session.run("print('before')\nx = 6\nwhile True:\n    pass")
        assert result.status == "timeout" and session.alive
        assert result.output.startswith("before\nTraceback") and "KeyboardInterrupt" in result.output
        assert result.output.endswith("[Time limit of 0.8 s reached: the cell was interrupted. Variables are kept.]\n")
        assert session.run("x").output == "6\n"


def test_what_does_not_react_to_the_interrupt_is_killed(impatient, monkeypatch):
    monkeypatch.setattr(sandbox_local, "GRACE_SECONDS", 0.2)
    with impatient.session() as session:
        result = session.run("print('lost?')\nsum(range(10**13))")
        assert result.status == "timeout" and not session.alive
        assert result.output.startswith("lost?\n[Time limit of 0.8 s reached; the cell did not react to an interrupt.")
        again = session.run("1")
        assert again.status == "ended" and "did not react" in again.output


def test_the_memory_limit_keeps_the_state(session):
    session.run("x = 1")
    result = session.run("y = [bytearray(10**6) for _ in range(10**6)]")
    assert result.status == "memory" and "Memory limit of 256 MiB" in result.output
    assert session.run("x").output == "1\n"


def test_wrong_keys_are_named():
    for key, value in {
        "sandbox": "docker", "sandbox_timeout": 0, "sandbox_memory_mb": 1, "sandbox_output_chars": 0,
        "sandbox_url": "http://x",
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=key):
            SandboxConfig(**{key: value})
    with pytest.raises(RecipeError, match="sandbox_url"):
        SandboxConfig(sandbox="remote")


# ---------------------------------------------------------------------------------------------------------------------
# many at once


def test_sessions_do_not_wait_for_each_other(sandbox):
    code = "import time\na = time.monotonic()\ntime.sleep(0.4)\nprint(a, time.monotonic())"

    async def rollouts():
        sessions = await asyncio.gather(*(sandbox.session_async() for _ in range(10)))
        results = await asyncio.gather(*(session.run_async(code) for session in sessions))
        for session in sessions:
            session.close()
        return results

    times = [result.output.split() for result in asyncio.run(rollouts())]
    assert max(float(start) for start, _ in times) < min(float(end) for _, end in times)  # all slept together


def test_cells_of_one_session_run_one_after_the_other(session):
    async def calls():
        return await asyncio.gather(*(session.run_async("n = globals().get('n', 0) + 1\nn") for _ in range(20)))

    outputs = sorted(int(result.output) for result in asyncio.run(calls()))
    assert outputs == list(range(1, 21))


def test_closing_in_the_middle_of_a_cell_ends_it(sandbox):
    session = sandbox.session()

    async def close_it():
        running = asyncio.ensure_future(session.run_async("import time\ntime.sleep(60)"))
        await asyncio.sleep(0.2)
        session.close()
        return await running

    assert asyncio.run(close_it()).status == "ended"
    assert session.run("1").status == "ended"
    session.close()


# ---------------------------------------------------------------------------------------------------------------------
# beginning and end


def test_nothing_is_left_behind():
    me = psutil.Process()
    children, descriptors = set(me.children(recursive=True)), me.num_fds()
    for allowed in (("namespaces", "landlock"), ()):
        sandbox = LocalSandbox(SandboxConfig(sandbox_unisolated=True), allowed)
        sessions = [sandbox.session() for _ in range(5)]
        for session in sessions[:3]:
            session.run("x = 1")
        sessions[0].close()
        sessions[1].run("import os; os._exit(0)")
        sessions.pop()  # forgotten, not closed
        sandbox.close()
        for session in sessions:
            session.close()
        with pytest.raises(SandboxError, match="closed"):
            sandbox.session()
        sandbox.close()
    session = None
    wait_until(lambda: set(me.children(recursive=True)) <= children)
    assert me.num_fds() == descriptors


def test_when_the_owner_is_killed_all_sessions_end():
    code = (
        "import sys, time, psutil\n"
        "from afterglow.core.sandbox import SandboxConfig\n"
        "from afterglow.core.sandbox_local import LocalSandbox\n"
        "sandbox = LocalSandbox(SandboxConfig(sandbox_unisolated=True))\n"
        "sessions = [sandbox.session() for _ in range(3)]\n"
        "print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True)\n"
        "sessions[0].run('while True: pass')\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    assert len(processes) >= 4
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: all(has_ended(process) for process in processes))


def test_a_killed_zygote_is_replaced():
    with LocalSandbox(SandboxConfig(sandbox_unisolated=True)) as sandbox:
        before = sandbox.session()
        zygote = psutil.Process(sandbox._zygote._process.pid)
        processes = [zygote, *zygote.children(recursive=True)]
        zygote.kill()
        wait_until(lambda: all(has_ended(process) for process in processes))
        with sandbox.session() as session:
            assert session.run("from scipy.special import comb\ncomb(5, 2, exact=True)").output == "10\n"
        with pytest.raises(SandboxError, match="ended"):
            before.run("1")
        before.close()


def test_without_isolation_it_refuses_and_says_why():
    with pytest.raises(SandboxError, match=r"(?s)allows no isolation.*sandbox_unisolated: true") as refusal:
        LocalSandbox(SandboxConfig(), allowed=())
    assert "max_user_namespaces" in str(refusal.value)

    with pytest.warns(UserWarning, match="without isolation"):
        sandbox = LocalSandbox(SandboxConfig(sandbox_unisolated=True), allowed=())
    with sandbox, sandbox.session() as session:
        assert sandbox.isolation == "none" and "NONE" in sandbox.describe()
        assert session.run("open('/etc/passwd').close()\nimport os; os.fork()").output.endswith(
            "PermissionError: [Errno 1] Operation not permitted\n"
        )


def test_a_sandbox_describes_itself(sandbox):
    assert "20 s a cell, 60 s processor time, 256 MiB memory, 64 MiB files" in sandbox.describe()
    assert "NONE" not in sandbox.describe()


def test_a_machine_without_user_namespaces_falls_back(tmp_path):
    """The sysctl that switches them off counts for a user namespace and those below it, so one can try it in one."""
    code = (
        "import os\n"
        "from afterglow.core import sandbox_jail, sandbox_kernel\n"
        "from afterglow.core.sandbox import SandboxConfig, open_sandbox\n"
        "sandbox_kernel.unshare(sandbox_kernel.NEW_USER)\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "with open_sandbox(SandboxConfig()) as sandbox, sandbox.session() as session:\n"
        "    print(sandbox.isolation, session.run('1').output, sandbox.describe())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    if "PermissionError" in run.stderr or "allows no isolation" in run.stderr or "OSError" in run.stderr:
        pytest.skip(f"cannot be tried here: {run.stderr.splitlines()[-1]}")
    assert run.stdout.startswith("landlock 1\n")
    assert "not possible here: namespaces: new user namespaces are not allowed" in run.stdout


def test_python_itself_below_tmp(tmp_path):
    """A session has a /tmp of its own, yet must see a virtual environment that stands in the machine's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        packages = Path(folder, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
        (packages / "only_here.py").write_text("ANSWER = 42\n")
        others = next(path for path in sys.path if path.endswith("site-packages"))
        (packages / "others.pth").write_text(f"import site; site.addsitedir({others!r})\n")
        cell = (
            "import os, numpy, only_here\n"
            "open('/tmp/mine', 'w').close()\n"
            f"only_here.ANSWER, sorted(os.listdir('/tmp')), os.access({str(packages)!r}, os.W_OK)"
        )
        script = (
            "from afterglow.core.sandbox import SandboxConfig\n"
            "from afterglow.core.sandbox_local import LocalSandbox\n"
            "with LocalSandbox(SandboxConfig(), ('namespaces',)) as sandbox, sandbox.session() as session:\n"
            f"    print(session.run({cell!r}).output)\n"
        )
        run = subprocess.run(
            [Path(folder, "bin", "python"), "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
    if "allows no" in run.stderr or "not possible here: namespaces" in run.stderr + run.stdout:
        pytest.skip("this machine allows no namespaces")
    assert run.stdout.strip() == str((42, sorted(["mine", Path(folder).name]), False)), run.stderr
