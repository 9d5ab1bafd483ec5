"""`afterglow launch slurm | hosts | kubernetes RECIPE`: the script or manifest that trains on several machines.

Printed, not sent: it is yours to read, change and submit. Each machine runs `afterglow train` with its own rank, so
that everything a single machine checks is checked there too.
"""

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import RecipeError
from ..core.recipe import Section
from .processes import Machines, choose_setup
from .vllm_server import needs_server, replicas

TEMPLATES = Path(__file__).parent / "cluster_templates"
FILES = {"slurm": "slurm.sh.j2", "hosts": "hosts.sh.j2", "kubernetes": "kubernetes.yaml.j2"}
OPTIONS = {
    "nodes": (int, "machines that train"),
    "gpus_per_node": (int, "GPUs of each machine"),
    "server_nodes": (int, "1: one more machine serves the model by vLLM, as `vllm_mode: server` needs it"),
    "accelerate_config": (str, "as of `afterglow train`; fsdp2 if not given"),
    "hosts": (str, "hosts: names of the machines, with commas between; the first is the head"),
    "port": (int, "hosts, kubernetes: a free port of the head; 29500 if not given"),
    "image": (str, "kubernetes: container image with afterglow"),
    "claim": (str, "kubernetes: persistent volume claim that holds recipe, data, model and runs"),
}
FOLDER = "/workspace"  # where the claim is mounted


@dataclass(frozen=True)
class Cluster:
    """What the command line says of the machines."""

    kind: str
    nodes: int = 1
    gpus_per_node: int = 8
    server_nodes: int = 0
    accelerate_config: str = "fsdp2"
    hosts: tuple[str, ...] = ()
    port: int = 29500
    image: str = ""
    claim: str = ""

    def __post_init__(self):
        """Refuse what cannot be started.

        Raises:
            RecipeError: everything that is wrong.
        """
        problems = []
        if self.kind not in FILES:
            problems.append(f"{self.kind}: none of {', '.join(FILES)}")
        if self.nodes < 1 or self.gpus_per_node < 1:
            problems.append("--nodes and --gpus_per_node must be at least 1")
        if self.server_nodes not in (0, 1):
            problems.append("--server_nodes must be 0 or 1: TRL sends weights to one server")
        if self.kind == "hosts" and not self.hosts:
            problems.append("--hosts is missing: names of the machines, with commas between")
        if bad := [host for host in self.hosts if not re.fullmatch(r"[\w.-]+", host)]:
            problems.append(f"--hosts: {bad[0]!r} is no name of a host")
        if self.kind == "hosts" and self.server_nodes:
            problems.append(
                "--server_nodes: with a list of hosts, run `afterglow serve RECIPE --port P` on another one yourself "
                "and add --vllm_server_base_url http://IT:P to this command"
            )
        if self.kind == "kubernetes" and not (self.image and self.claim):
            problems.append("--image and --claim are missing: the container image, and the volume claim it works in")
        if problems:
            raise RecipeError("afterglow launch: " + "; ".join(problems) + ".")


def read_cluster(kind: str, words: list[str]) -> tuple[Cluster, list[str]]:
    """Split a command line into what it says of the machines and the keys of the recipe.

    Raises:
        RecipeError: the machines cannot be.
    """
    parser = argparse.ArgumentParser(prog="afterglow launch", allow_abbrev=False, add_help=False)
    for name, (kind_of, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, type=kind_of, help=text)
    given, overrides = parser.parse_known_args(words)
    values = {name: value for name, value in vars(given).items() if value is not None}
    if "hosts" in values:
        values["hosts"] = tuple(host.strip() for host in values["hosts"].split(",") if host.strip())
        if values.setdefault("nodes", len(values["hosts"])) != len(values["hosts"]):
            raise RecipeError(f"--nodes {values['nodes']}: --hosts names {len(values['hosts'])}.")
    return Cluster(kind=kind, **values), overrides


def render(cluster: Cluster, recipe: str, overrides: list[str], training: Any, command: str) -> str:
    """Return the text of the script or manifest.

    Args:
        cluster: the machines.
        recipe: path of the recipe, as the machines will see it.
        overrides: its keys given on the command line.
        training: what `training_recipe.parse` made of both.
        command: what asked for this, for the header.

    Raises:
        RecipeError: recipe and machines do not fit.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    _check_server(cluster, training.args)
    nodes, processes = cluster.nodes, cluster.nodes * cluster.gpus_per_node
    machines = Machines(nodes, 0, "head", cluster.port)
    setup = choose_setup(cluster.accelerate_config, processes, cluster.gpus_per_node, machines)
    name = re.sub(r"[^a-z0-9]+", "-", Path(recipe).stem.lower()).strip("-") or "afterglow"
    train = ["afterglow", "train", recipe, *overrides, "--accelerate_config", setup.name]
    train += ["--num_processes", str(processes)]
    if nodes > 1 or cluster.kind != "kubernetes":
        train += ["--num_machines", str(nodes)]
    serve = ["afterglow", "serve", recipe, *overrides, "--host", "0.0.0.0"]
    head = f"{name}-trainer-0-0.{name}"
    ranked = 'exec "$@" --machine_rank "$JOB_COMPLETION_INDEX"' if nodes > 1 else 'exec "$@"'
    if nodes > 1:
        ranked += f" --main_process_ip {head} --main_process_port {cluster.port}"
    if cluster.server_nodes:
        server = f"http://{name}-server-0-0.{name}:{cluster.port + 1}"
        ranked += f" --vllm_server_base_url {server} --vllm_group_port {cluster.port + 2}"
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(FILES[cluster.kind]).render(
        origin=f"Written by: {command}",
        batch=_batch(training.args, nodes, cluster.gpus_per_node),
        name=name,
        nodes=nodes,
        server_nodes=cluster.server_nodes,
        gpus=cluster.gpus_per_node,
        hosts=cluster.hosts,
        port=cluster.port,
        image=cluster.image,
        claim=cluster.claim,
        folder=FOLDER,
        train=shlex.join(train),
        serve=shlex.join(serve),
        train_words=train,
        serve_words=serve,
        train_command=ranked,
    )


def _check_server(cluster: Cluster, args: Any) -> None:
    """Compare the recipe's engine with the machines."""
    wanted = needs_server(args) and not args.vllm_server_base_url
    if wanted and not cluster.server_nodes and cluster.kind != "hosts":
        raise RecipeError("`vllm_mode: server`: no machine serves. Add --server_nodes 1.")
    if wanted and cluster.kind == "hosts":
        raise RecipeError(
            "`vllm_mode: server`: run `afterglow serve RECIPE --port P` on another host and add "
            "--vllm_server_base_url http://IT:P."
        )
    if cluster.server_nodes and not wanted:
        raise RecipeError("--server_nodes 1: the recipe samples from no server (`vllm_mode: server`).")
    if cluster.server_nodes:
        replicas(cluster.gpus_per_node, args.vllm_tensor_parallel_size)


def _batch(args: Any, nodes: int, gpus: int) -> str:
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    total = nodes * gpus * rows * steps
    return f"{nodes} node(s) x {gpus} GPU(s) x {rows} row(s) x {steps} accumulated = {total} rows in a step"


def run_launch(target: list[str], words: list[str]) -> int:
    """Do `afterglow launch KIND RECIPE ...`: check both, and print.

    Raises:
        RecipeError: the words are no such command, or anything in them is wrong.
    """
    from ..core.recipe import read_recipe
    from .training_recipe import parse

    if len(target) != 2:
        raise RecipeError(
            f"usage: afterglow launch {'|'.join(FILES)} RECIPE [--nodes N --gpus_per_node N ...] [--key value ...]"
        )
    kind, recipe = target
    cluster, overrides = read_cluster(kind, words)
    section: Section = read_recipe(recipe, overrides)
    command = shlex.join(["afterglow", "launch", kind, recipe, *words])
    print(render(cluster, recipe, overrides, parse(section), command), end="")
    return 0
