"""What `afterglow launch` prints, against stored files, and what bash makes of it where stand-ins play the cluster."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from afterglow.core.errors import RecipeError
from afterglow.launch.cli import main
from afterglow.launch.cluster import Cluster

RENDERED = Path(__file__).parent / "rendered"
STORED = sorted(path.name for path in RENDERED.iterdir())
SCRIPTS = [name for name in STORED if name.endswith(".sh")]
RECIPE = "tool_rlvr/qwen3-0.6b-gsm8k.yaml"


def command_of(name: str) -> list[str]:
    """The words after `# Written by: afterglow` in a stored file: run them into the file to renew it."""
    line = next(line for line in (RENDERED / name).read_text().splitlines() if "Written by: afterglow " in line)
    return shlex.split(line.split("Written by: afterglow ", 1)[1])


@pytest.mark.parametrize("name", STORED)
def test_what_is_printed_is_what_is_stored(name, capsys):
    assert main(command_of(name)) == 0
    assert capsys.readouterr().out == (RENDERED / name).read_text()


def test_every_kind_is_stored_with_and_without_a_server():
    assert STORED == ["hosts.sh", "job.yaml", "jobset-server.yaml", "slurm-server.sh", "slurm.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_scripts(name):
    assert subprocess.run(["bash", "-n", RENDERED / name], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", STORED)
def test_nothing_is_said_of_a_site(name):
    text = (RENDERED / name).read_text().lower()
    assert not [word for word in ("partition=g", "account=", "module load", "nccl_", "conda") if f"\n{word}" in text]
    assert "pkill" not in text and "killall" not in text


STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then printf "n0\\nn1\\nn2\\n"; else echo "$@" >> "$LOG"; kill -TERM 0; fi',
    "srun": """tasks=1
while [ "${1#--}" != "$1" ]; do case $1 in --ntasks=*) tasks=${1#*=};; esac; shift; done
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; exit 143' TERM
for ((rank = 0; rank < tasks; rank++)); do SLURM_PROCID=$rank "$@" & pids+=($!); done
code=0; for pid in "${pids[@]}"; do wait "$pid" || code=$?; done; exit $code""",
    "ssh": """while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
echo "host $1" >> "$LOG"; exec bash -c "$2" """,
    "afterglow": """printf '%s\\n' "$(printf '%q ' "$@")" >> "$LOG"
[ "$1" = serve ] && [ -z "${SERVER_DIES:-}" ] && exec sleep 60
[ "$1" = train ] && [ -n "${SERVER_DIES:-}${LONG:-}" ] && exec sleep 60
case "$*" in train*vllm_server_base_url*) until grep -q ^serve "$LOG"; do sleep 0.05; done;; esac
case " $* " in *"--machine_rank ${FAILS:-none} "*) exit 7;; esac
exit 0""",
}


@pytest.fixture
def play(tmp_path):
    """Run a stored script with stand-ins for the cluster; returns its exit code, the commands it ran, and stderr."""
    for name, body in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    log = tmp_path / "log"

    def run(script, **environment):
        log.write_text("")
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log)}
        env |= {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "n[0-2]", **environment}
        words = ["bash", RENDERED / script]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=50, start_new_session=True)
        return done.returncode, sorted(log.read_text().splitlines()), done.stderr

    return run


def test_each_node_puts_in_its_own_rank(play):
    code, commands, _ = play("slurm.sh")
    assert code == 0
    assert [shlex.split(line)[-6:] for line in commands] == [
        ["--machine_rank", str(rank), "--main_process_ip", "n0", "--main_process_port", "33701"] for rank in (0, 1)
    ]
    assert all(shlex.split(line)[:4] == ["train", RECIPE, "--run_name", "it's 2"] for line in commands), commands


def test_the_server_is_told_to_the_trainers_and_ends_with_them(play):
    code, commands, _ = play("slurm-server.sh")
    assert code == 0
    serve, *train = commands
    assert serve.startswith("serve ") and "--host 0.0.0.0 --port 33702" in serve
    assert len(train) == 2
    assert all("--vllm_server_base_url http://n2:33702 --vllm_group_port 33703" in line for line in train)
    code, _, error = play("slurm-server.sh", SERVER_DIES="1")
    assert code == 1 and "the vLLM server ended before the training" in error


def test_a_failed_node_is_the_jobs_failure(play):
    assert play("slurm.sh", FAILS="1")[0] == 7
    assert play("hosts.sh", FAILS="0")[0] == 7
    assert play("hosts.sh", FAILS="1")[0] == 7


def test_hosts_are_reached_in_order(play):
    code, commands, _ = play("hosts.sh")
    assert code == 0
    assert commands[:2] == ["host alpha", "host beta.example"]
    for rank, line in enumerate(commands[2:]):
        words = shlex.split(line)
        assert words[:4] == ["train", RECIPE, "--run_name", "it's 2"]
        assert words[-6:] == ["--main_process_ip", "alpha", "--main_process_port", "29500", "--machine_rank", str(rank)]


def test_the_time_limit_queues_the_job_again(play, tmp_path):
    script = (RENDERED / "slurm.sh").read_text().replace("status=0", 'status=0\n(kill -USR1 "$$") &')
    (tmp_path / "limit.sh").write_text(script)
    code, commands, error = play(tmp_path / "limit.sh", LONG="1")
    assert "requeue 1234567" in commands and "time limit: queued again" in error and code != 0


def test_the_manifests_are_yaml_that_says_it_all():
    job = yaml.safe_load((RENDERED / "job.yaml").read_text())
    assert job["kind"] == "Job" and job["spec"]["backoffLimit"] == 3
    jobset = yaml.safe_load((RENDERED / "jobset-server.yaml").read_text())
    trainer, server = jobset["spec"]["replicatedJobs"]
    assert (trainer["template"]["spec"]["parallelism"], server["template"]["spec"]["parallelism"]) == (2, 1)
    words = trainer["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert '--machine_rank "$JOB_COMPLETION_INDEX"' in words[2] and words[words.index("--num_processes") + 1] == "16"
    host = f"{jobset['metadata']['name']}-server-0-0.{jobset['metadata']['name']}"
    assert f"--vllm_server_base_url http://{host}:29501" in words[2]


@pytest.mark.parametrize(
    "words, says",
    [
        (["slurm"], "usage: afterglow launch"),
        (["pbs", RECIPE], "pbs: none of slurm, hosts, kubernetes"),
        (["slurm", RECIPE, "--learning_rat", "1"], "Did you mean `learning_rate`"),
        (["slurm", RECIPE, "--vllm_mode", "server"], "no machine serves. Add --server_nodes 1"),
        (["slurm", RECIPE, "--server_nodes", "1"], "samples from no server"),
        (["hosts", RECIPE], "--hosts is missing"),
        (["hosts", RECIPE, "--hosts", "a;reboot"], "'a;reboot' is no name of a host"),
        (["hosts", RECIPE, "--hosts", "a,b", "--nodes", "3"], "--hosts names 2"),
        (["kubernetes", RECIPE], "--image and --claim are missing"),
        (["slurm", RECIPE, "--accelerate_config", "single"], "is for one process"),
        (
            ["slurm", RECIPE, "--vllm_mode", "server", "--server_nodes", "1", "--vllm_tensor_parallel_size", "3"],
            "does not divide the 8 GPU",
        ),
    ],
)
def test_what_cannot_be_started_is_refused(words, says, capsys):
    assert main(["launch", *words]) == 2
    captured = capsys.readouterr()
    assert says in captured.err.replace("\n", " ") and captured.out == ""


def test_serving_is_checked_like_training(capsys):
    serve = ["serve", RECIPE, "--dry_run", "--port", "8123"]
    assert main(serve) == 2 and "samples from no server" in capsys.readouterr().err.replace("\n", " ")
    assert main([*serve, "--vllm_mode", "server"]) == 0
    out = capsys.readouterr().out
    assert "--model Qwen/Qwen3-0.6B --host 127.0.0.1 --port 8123" in out and "--max-model-len 3072" in out


def test_a_cluster_needs_machines():
    with pytest.raises(RecipeError, match="must be at least 1"):
        Cluster("slurm", nodes=0)
