import configparser
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from clipkit.cli import doctor
from clipkit.cli.doctor import EXTRAS, clashes, examine, required_torch, version_of
from clipkit.cli.main import main

NOTHING = dict.fromkeys(("torch", "torchvision", "torch_xla", "tensorflow"))


def test_this_environment_has_no_problems_and_says_its_device():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    findings = json.loads(result.output)
    assert findings["problems"] == []
    assert [findings["versions"][name] for name in ("torch", "timm")] == [
        version_of(name) for name in ("torch", "timm")
    ]
    assert findings["device"].split()[0] in ("cpu", "cuda", "xla")


def test_a_person_is_told_which_extra_brings_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "find_device", lambda problems: "cpu")  # which takes seconds, and is tested above
    missing = set(EXTRAS["download"])
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in missing else version_of(name))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "pip install 'clipkit[download]'" in " ".join(result.output.split())


@pytest.mark.parametrize("extra", ["ray", "spark", "s3", "gs", "download"])
def test_every_extra_is_looked_for(monkeypatch, extra):
    monkeypatch.setattr(doctor, "find_device", lambda problems: "cpu")
    missing = EXTRAS[extra][-1]
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == missing else version_of(name))
    assert f"[{extra}] isn't installed ({missing}): pip install 'clipkit[{extra}]'" in examine().notes


def test_a_person_is_told_where_nothing_was_compiled(monkeypatch):
    monkeypatch.setattr(doctor, "find_device", lambda problems: "cpu")
    assert not any("compile" in note for note in examine().notes)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert any("install a C compiler and then clipkit again" in note for note in examine().notes)


def test_the_extras_are_those_of_the_package():
    """Whoever gives an extra a package more tells doctor too."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[3] / "setup.cfg")
    assert set(EXTRAS) == set(config["options.extras_require"]) - {"dev", "all"}
    for extra, packages in EXTRAS.items():
        declared = {Requirement(line).name for line in config["options.extras_require"][extra].split("\n") if line}
        assert set(packages) == declared - ({"torch", "torchvision"} if extra == "tpu" else set())


def test_spark_without_java_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "find_device", lambda problems: "cpu")
    monkeypatch.setenv("JAVA_HOME", "/none")
    assert any("Spark needs Java, and JAVA_HOME is /none" in problem for problem in examine().problems)
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "pyspark" else version_of(name))
    assert not any("Java" in problem for problem in examine().problems)


def test_a_missing_core_package_is_a_problem_with_exit_code_1(monkeypatch):
    monkeypatch.setattr(doctor, "find_device", lambda problems: "cpu")
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "ftfy" else version_of(name))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "ftfy is missing: pip install clipkit" in " ".join(result.output.split())


def test_torch_and_torchvision_must_be_a_pair():
    assert clashes(NOTHING | {"torch": version_of("torch"), "torchvision": "0.1"}) == []
    found = clashes(NOTHING | {"torch": "1.0", "torchvision": "0.1"})
    assert found == [
        f"torchvision 0.1 needs torch {required_torch()}, but torch 1.0 is here: install the pair together"
    ]


def test_a_torchvision_that_ends_the_process_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", "false")
    problems: list[str] = []
    doctor.find_device(problems)
    assert problems == ["torchvision doesn't load beside this torch: install the pair together, from one index"]


def test_torch_xla_needs_its_own_torch():
    found = clashes(NOTHING | {"torch": "2.15.0", "torch_xla": "2.9.0"})
    assert found == ["torch_xla 2.9.0 needs torch 2.9.0, but torch 2.15.0 is here: use an environment of its own"]


@pytest.mark.parametrize(("tensorflow", "clash"), [("2.16.1", False), ("2.21.0", True)])
def test_tensorflow_io_does_not_load_beside_newer_tensorflows(monkeypatch, tensorflow, clash):
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.37.1" if name == "tensorflow-io" else None)
    assert bool(clashes(NOTHING | {"tensorflow": tensorflow})) is clash


def test_a_torch_that_does_not_load_is_a_problem_and_no_traceback(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", "true")  # where torchvision loads
    monkeypatch.setitem(sys.modules, "clipkit.device", None)
    problems: list[str] = []
    assert doctor.find_device(problems) == "none"
    assert "torch doesn't load" in problems[-1]
