"""The judge against a scripted server on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filter_tables import row, run_filter

from afterglow.core.errors import GenerationError, RecipeError
from afterglow.core.recipe import Section, build
from afterglow.data_filters import judge, judged_steps
from afterglow.data_filters.judge import Judge
from afterglow.data_filters.judged_steps import JudgedStepsConfig, precision_recall, questions_of, read_labels

PLAIN = "We add the two numbers and get four."
BRANCH = "Perhaps there is a shorter way to count."
VERIFY = "Let me check the sum once more: fine."


class Server(ThreadingHTTPServer):
    """Answers a chat with what `answer(prompt)` returns: a text, a status, or None: never, until the test is over."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.prompts, self.bodies = answer, [], []
        self.over = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body | {"authorization": self.headers.get("Authorization"), "path": self.path})
        prompt = body["messages"][0]["content"]
        self.server.prompts.append(prompt)
        answer = self.server.answer(prompt)
        if answer is None:
            self.server.over.wait(30)
            return
        reply = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        text = json.dumps(reply if not isinstance(answer, int) else {"error": "no"}).encode()
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(judge, "wait_before", lambda number: 0.0)
    servers = []

    def start(answer):
        server = Server(answer)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def judge_of(server, tmp_path, **changes):
    settings = {"timeout": 10.0, "tries": 2, "concurrency": 2} | changes
    return Judge(server.url, "j", tmp_path / "cache", **settings)


def letter(i, reply):
    return reply if reply in ("a", "b") else None


def by_keyword(prompt):
    """Labels as a judge who knows three words."""
    steps = prompt.partition("Steps to label:\n")[2].partition("\n\nReply")[0].splitlines()
    labels = ["propose" if "Perhaps" in s else "verify" if "check" in s else "deduce" for s in steps]
    return f"<think>[1] hm</think>Here: {json.dumps(labels)}"


# ---------------------------------------------------------------------------------------------------------------------
# the client


def test_answers_come_in_order_and_are_asked_once_ever(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda prompt: "<think>b or a?</think>\n" + prompt)
    prompts = ["a", "b", "a", "b"]
    one = judge_of(server, tmp_path).ask(prompts, letter)
    assert [v.value for v in one] == prompts and {v.outcome for v in one} == {"answered"}
    assert server.bodies[0]["authorization"] == "Bearer secret" and server.bodies[0]["model"] == "j"
    assert server.bodies[0]["path"] == "/v1/chat/completions"
    asked = len(server.prompts)
    assert judge_of(server, tmp_path).ask(prompts, letter) == one and len(server.prompts) == asked
    other = Judge(server.url + "/v1/", "another", tmp_path / "cache", tries=1)
    other.ask(["a"], letter)
    assert len(server.prompts) == asked + 1, "another judge is asked for itself"


def test_nonsense_is_asked_again_and_then_stated(serve, tmp_path):
    replies = {"a": iter(["who knows", "a"]), "x": iter(["?", "?", "a"])}
    server = serve(lambda prompt: next(replies[prompt]))
    verdicts = judge_of(server, tmp_path).ask(["a", "x"], letter)
    assert verdicts == [("a", "answered"), (None, "nonsense")]
    assert sorted(server.prompts) == ["a", "a", "x", "x"]
    assert judge_of(server, tmp_path).ask(["a", "x"], letter) == [("a", "answered"), ("a", "answered")]
    assert server.prompts.count("a") == 2, "nonsense is not cached, an answer is"


def test_a_judge_that_never_answers_times_out(serve, tmp_path):
    server = serve(lambda prompt: None if prompt == "x" else prompt)
    verdicts = judge_of(server, tmp_path, timeout=0.3).ask(["a", "x"], letter)
    assert verdicts[1] == (None, "timeout")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(serve, tmp_path, status):
    replies = iter([status, "a"])
    assert judge_of(serve(lambda prompt: next(replies)), tmp_path).ask(["a"], letter) == [("a", "answered")]
    server = serve(lambda prompt: status)
    assert judge_of(server, tmp_path).ask(["b"], letter) == [(None, "server_error")]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_ends_the_run(serve, tmp_path, status):
    server = serve(lambda prompt: status)
    with pytest.raises(GenerationError, match=rf"refuses with status {status}.*`judge_model` \(j\).*OPENAI_API_KEY"):
        judge_of(server, tmp_path).ask(["a"] * 5, letter)


def test_a_server_that_is_not_there_ends_the_run(serve, tmp_path):
    server = serve(lambda prompt: "a")
    gone = Judge("http://127.0.0.1:1", "j", tmp_path / "cache")
    with pytest.raises(GenerationError, match=r"no judge answers at http://127\.0\.0\.1:1"):
        gone.ask(["a"], letter)
    judge_of(server, tmp_path).ask(["a"], letter)
    assert gone.ask(["a"], letter) == [("a", "answered")], "what is cached needs no server"


def test_only_nonsense_ends_the_run_and_keeps_the_answers(serve, tmp_path):
    server = serve(lambda prompt: prompt)
    one_by_one = judge_of(server, tmp_path, concurrency=1, tries=1)
    with pytest.raises(
        GenerationError, match="answered none of the last 20 questions; the last outcome was `nonsense`"
    ):
        one_by_one.ask(["a", *(f"x{i}" for i in range(50))], letter)
    assert one_by_one.ask(["a"], letter) == [("a", "answered")] and server.prompts.count("a") == 1


# ---------------------------------------------------------------------------------------------------------------------
# labels


@pytest.mark.parametrize(
    ("reply", "labels"),
    [
        ('["propose", "deduce"]', ["propose", "deduce"]),
        ('Sure: [1]\n```json\n["Propose", " deduce "]\n```', ["propose", "deduce"]),
        ('["propose"]', None),
        ('["propose", "explore"]', None),
        ('["propose", 2]', None),
        ("propose, deduce", None),
        ('["propose", "deduce"', None),
        ("", None),
    ],
)
def test_read_labels(reply, labels):
    assert read_labels(reply, 2) == labels


def test_questions_show_the_step_before():
    one, two = questions_of(7, [PLAIN, BRANCH, "x" * 5000], per_request=2)
    assert (one.start, one.size, two.start, two.size) == (0, 2, 2, 1)
    assert f"1. {PLAIN}\n2. {BRANCH}" in one.prompt and "The step before" not in one.prompt
    assert f"The step before:\n{BRANCH}" in two.prompt and "[...]" in two.prompt and len(two.prompt) < 3000
    assert questions_of(0, [], 2) == []


def test_precision_and_recall():
    found, true = [True, True, True, False], [True, False, False, True]
    assert precision_recall(found, true) == {"precision": 1 / 3, "recall": 1 / 2, "found": 3, "true": 2, "both": 1}
    nothing = precision_recall([False], [False])
    assert nothing["precision"] is None and nothing["recall"] is None


def test_keywords_are_compared_with_the_judge(serve, tmp_path):
    server = serve(by_keyword)
    missed = "One could also count them on the fingers; Perhaps."  # a keyword for both
    rows = [
        row("a", "\n\n".join([PLAIN, BRANCH, missed, VERIFY]), source="s"),
        row("b", "\n\n".join([PLAIN, "Maybe five apples are in the basket."])),
        row("c", ""),
    ]
    config = JudgedStepsConfig(server.url, "j", steps_per_request=3, judge_cache=str(tmp_path / "cache"), tries=1)
    result = run_filter(judged_steps, rows, config, tmp_path)
    assert result.dropped == {} and result.scores["judged_propose_ratio"] == [1 / 2, 0, None]
    report = result.report
    assert report["questions"] == {"answered": 3} and report["steps"] == report["steps_labelled"] == 6
    branch = report["keywords_against_the_judge"]["branch_keywords"]
    assert branch == {"precision": 2 / 3, "recall": 1, "found": 3, "true": 2, "both": 2}
    assert report["by_source"]["s"]["propose_after_propose"] == 1 / 2
    assert report["by_source"]["s"]["shares"]["verify"] == 1 / 4
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["deduce", "propose", "propose", "verify", "deduce", "deduce"]


def test_steps_without_an_answer_count_nowhere(serve, tmp_path):
    server = serve(
        lambda prompt: "no idea" if "Perhaps" in prompt.partition("Steps to label")[2] else by_keyword(prompt)
    )
    rows = [row("a", "\n\n".join([PLAIN, BRANCH])), row("b", "\n\n".join([PLAIN, VERIFY]))]
    config = JudgedStepsConfig(server.url, "j", judge_cache=str(tmp_path / "cache"), tries=1)
    report = run_filter(judged_steps, rows, config, tmp_path).report
    assert report["questions"] == {"answered": 1, "nonsense": 1}
    assert (report["steps"], report["steps_labelled"]) == (4, 2)
    assert report["keywords_against_the_judge"]["branch_keywords"]["recall"] is None


def test_the_sample_is_drawn_by_the_seed(serve, tmp_path):
    server = serve(by_keyword)
    rows = [row(f"{i}", f"{PLAIN} {i}") for i in range(20)]
    config = JudgedStepsConfig(server.url, "j", rows=3, judge_cache=str(tmp_path / "cache"))
    drawn = [
        run_filter(judged_steps, rows, config, tmp_path, seed).scores["judged_propose_ratio"] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and [d.count(0.0) for d in drawn] == [3, 3, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "`rows` must be at least 1"),
        ({"timeout": 0.0}, "`timeout` is in seconds"),
        ({"server_url": "localhost:8000"}, "must start with http://"),
    ],
)
def test_a_wrong_recipe_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section({"server_url": "http://x", "judge_model": "j"} | values), JudgedStepsConfig)
