"""Recipes for CI services: valid by the services' schemas.  ``make test-recipes`` runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
GITLAB = yaml.safe_load((ROOT / "ci/gitlab.yml").read_text())


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-actions", "action.yml"),
        ("vendor.github-workflows", ".github/workflows/test.yml"),
        ("vendor.gitlab-ci", "ci/gitlab.yml"),
    ],
)
def test_the_service_accepts_the_file(schema: str, file: str) -> None:
    command = ("-m", "check_jsonschema", "--builtin-schema", schema, "--no-cache", ROOT / file)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_jobs_of_the_project_are_targets_of_its_makefile() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    jobs = workflow["jobs"]
    targets = [
        target
        for job in (jobs["packages"], jobs["nightly"])
        for target in job["strategy"]["matrix"]["target"]
    ]
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
    assert jobs["all"]["steps"][-1]["run"].endswith(" .ci/run")


def test_every_input_of_the_action_is_used_and_no_other() -> None:
    text = (ROOT / "action.yml").read_text()
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(ACTION["inputs"])


def test_scripts_of_the_action_contain_no_expression() -> None:
    """An expression in a script would run an input as code."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", "")


def test_the_containerfile_installs_what_the_command_needs() -> None:
    text = (ROOT / "ci/Containerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    (dependencies,) = re.findall(r"^dependencies = \[(.*)\]$", project, re.MULTILINE)
    for name in re.findall(r'"([\w-]+)', dependencies):
        assert f"python3-{name}" in text


def test_the_development_container_makes_a_target() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    make, target = container["postCreateCommand"].split()
    assert make == "make"
    assert f"\n{target}: " in (ROOT / "Makefile").read_text()
    assert container["remoteEnv"]["PATH"].startswith("${containerWorkspaceFolder}/.venv/bin:")
