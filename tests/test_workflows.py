""".github and .pre-commit-config.yaml, which run elsewhere: they name nothing that is not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a source checkout")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_each_step_is_a_make_target_or_an_action_of_a_version(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for name, job in jobs.items():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(jobs), name
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", step["uses"]), step
            else:
                assert re.fullmatch(r"make ([a-z-]+)( [A-Z_]+=\S+)*", step["run"]), step
                assert step["run"].split()[1] in targets, f"{name}: {step['run']}"


def test_wheels_are_published_without_a_password_and_only_when_tried():
    jobs = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"]["id-token"] == "write"
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert {"source", "try"} <= set(jobs["publish"]["needs"]) and jobs["try"]["needs"] == "build"
    assert jobs["build"]["container"].startswith("quay.io/pypa/manylinux_2_28_")
    assert "secrets." not in "".join(path.read_text() for path in WORKFLOWS)


def test_the_tests_cover_the_python_and_torch_that_are_promised():
    project = (ROOT / "pyproject.toml").read_text()
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    rows = jobs["tests"]["strategy"]["matrix"]["include"]
    oldest, torch = (re.search(p, project)[1] for p in (r'python = ">=(.*?)"', r'"torch>=(.*?)"'))
    assert {"python": oldest, "torch": f"{torch}.0"} in rows
    assert {x["python"] for x in rows} == {"3.10", "3.11", "3.12", "3.13"}


def test_pre_commit_has_the_tools_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    project = (ROOT / "pyproject.toml").read_text()
    pinned = dict(re.findall(r'"([\w-]+)==([\d.]+)"', project))
    found = {x["repo"].rsplit("/", 1)[-1]: x["rev"] for x in hooks if "rev" in x}
    assert found == {
        "ruff-pre-commit": f"v{pinned['ruff']}",
        "mirrors-clang-format": f"v{pinned['clang-format']}",
    }


def test_the_version_is_the_same_where_it_is_written_twice():
    version = re.search(r'= "(.*)"', (ROOT / "pro_kernels/_version.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].startswith(f"{version} (")
