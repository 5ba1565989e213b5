"""The workflows: valid, safe, and refusing to publish from another address than the book's own."""

import re
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT, SCRIPTS

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_workflows_and_dependabot_follow_their_schemas():
    for schema, files in {"github-workflows": WORKFLOWS, "dependabot": [ROOT / ".github" / "dependabot.yml"]}.items():
        result = run(SCRIPTS / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
        assert result.returncode == 0, result.stdout


def test_zizmor_finds_nothing():
    result = run(SCRIPTS / "zizmor", "--offline", "--persona", "auditor", "--no-progress", ROOT / ".github")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_permissions_start_empty(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    assert "concurrency" in workflow
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_checks_run_the_commands_of_the_readme():
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())["jobs"]["check"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == ["make book", "make test", "make nbval"]
    readme = (ROOT / "README.md").read_text()
    assert all(command in readme for command in commands)


@pytest.mark.parametrize(
    ("home", "here", "passes"),
    [
        ("https://github.com/owner/book", "https://github.com/owner/book", True),
        ("https://github.com/owner/book", "https://github.com/fork/book", False),
        ("", "https://github.com/owner/book", False),
    ],
)
def test_publishing_needs_its_own_home(tmp_path, home, here, passes):
    config = re.sub(r'^  url: ".*"$', f'  url: "{home}"', (ROOT / "_config.yml").read_text(), flags=re.MULTILINE)
    (tmp_path / "_config.yml").write_text(config)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())["jobs"]
    (guard,) = [step["run"] for step in jobs["home"]["steps"] if "run" in step]
    result = run(shutil.which("bash"), "-e", "-c", guard, cwd=tmp_path, env={"HERE": here, "PATH": "/usr/bin:/bin"})
    assert (result.returncode == 0) == passes
    assert passes or f"make home URL={here}" in result.stdout
    assert jobs["execute"]["needs"] == "home"
    assert jobs["deploy"]["needs"] == "execute"
